"""``fleet init | serve | apply | renew | doctor | demo``. A face, no logic."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from edgefleet_shared.clock import SystemClock
from edgefleet_shared.faces import told

from edgefleet_controller.cli.output import document, home_option, json_option, say


@click.command()
@home_option
@click.option(
    "--listen",
    envvar="EDGEFLEET_LISTEN",
    default="127.0.0.1:8443",
    show_default=True,
    show_envvar=True,
    help="host:port of the HTTPS API.",
)
@click.option(
    "--public-url",
    envvar="EDGEFLEET_PUBLIC_URL",
    default="",
    show_envvar=True,
    help="How boards reach the API; default https://LISTEN, where that names this machine.",
)
@click.option(
    "--broker",
    envvar="EDGEFLEET_BROKER",
    default="embedded",
    show_default=True,
    show_envvar=True,
    help="Or host:port of a broker that someone else runs.",
)
@click.option(
    "--broker-host",
    envvar="EDGEFLEET_BROKER_HOST",
    default="127.0.0.1",
    show_default=True,
    help="Where boards find the embedded broker.",
)
@click.option(
    "--broker-port",
    envvar="EDGEFLEET_BROKER_PORT",
    default=8883,
    show_default=True,
    type=click.IntRange(1, 65535),
    help="Its TLS port.",
)
@click.option("--host", "hosts", multiple=True, help="Another name or address for the server's certificate.")
@click.option("--signers", default=1, show_default=True, help="How many root and targets keys to make.")
@click.option("--threshold", default=1, show_default=True, help="How many of them must sign.")
@json_option
@told
def init(
    home: Path,
    listen: str,
    public_url: str,
    broker: str,
    broker_host: str,
    broker_port: int,
    hosts: tuple[str, ...],
    signers: int,
    threshold: int,
    as_json: bool,
) -> None:
    """Make a fleet: certificate authority, signing keys, an empty signed image repository.

    Move HOME/keys/offline to a safe place afterwards: the controller never needs it, only `fleet apply` and signing do.
    """
    from edgefleet_controller.home import create

    made = create(
        home, listen=listen, public_url=public_url, broker=broker, broker_host=broker_host, broker_port=broker_port,
        hosts=hosts, signers=signers, threshold=threshold, clock=SystemClock(),
    )  # fmt: skip
    if as_json:
        document({"home": str(made.home), "url": made.public_url, "broker": ":".join(map(str, made.broker_address))})
    else:
        say(f"a fleet in {made.home}; start it: fleet serve --home {made.home}")


@click.command()
@home_option
@told
def serve(home: Path) -> None:
    """Run the controller: API, broker, rollout engine, compile workers. Ends with SIGTERM."""
    from edgefleet_controller import settings
    from edgefleet_controller.app import serve as run

    run(settings.read(home))


@click.command()
@home_option
@click.option("-f", "--file", "path", required=True, type=click.Path(path_type=Path), help="A manifest, or a folder.")
@click.option("--keys", type=click.Path(path_type=Path), help="Offline keys; default HOME/keys/offline.")
@json_option
@told
def apply(home: Path, path: Path, keys: Path | None, as_json: bool) -> None:
    """Validate manifests and register the device classes among them.

    Everything is validated before anything is changed. Models are added by `fleet model add`, rollouts are started by `fleet
    rollout create`, because both are acts, not states.
    """
    from edgefleet_controller.applying import apply_manifests

    done = apply_manifests(home, path, keys)
    if as_json:
        document(done)
        return
    for row in done:
        say(f"{row['kind']} {row['name']}: {row['done']}")


@click.command()
@home_option
@click.option("--keys", type=click.Path(path_type=Path), help="Offline keys; default HOME/keys/offline.")
@json_option
@told
def renew(home: Path, keys: Path | None, as_json: bool) -> None:
    """Sign root, targets and the classes' metadata anew that have less than half of their life left.

    Root and targets are good for a year, a class's metadata for half a year after its last release. Once one of them has ended boards take
    nothing new; they go on serving what they have. `fleet doctor` says what ends first.
    """
    from edgefleet_controller import release
    from edgefleet_controller.client import FleetClient
    from edgefleet_controller.sign import ReleaseSigner

    signed = release.renew(FleetClient(home), ReleaseSigner(keys or home / "keys" / "offline", SystemClock()))
    if as_json:
        document({"signed": signed})
    else:
        say(f"signed anew: {', '.join(signed) or 'nothing is due'}")


@click.command()
@home_option
@json_option
@told
def doctor(home: Path, as_json: bool) -> None:
    """Check the fleet's home, keys, broker, ports, certificates, disk and the running controller."""
    from edgefleet_controller.doctor import examine

    findings = examine(home)
    if as_json:
        document([{"what": f.what, "ok": f.ok, "detail": f.detail} for f in findings])
    else:
        for finding in findings:
            say(f"{'ok  ' if finding.ok else 'BAD '} {finding.what}: {finding.detail}")
    if not all(finding.ok for finding in findings):
        sys.exit(1)


@click.command()
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures of this run here.")
@click.option("--short", is_flag=True, help="Fewer boards and pictures, for tests.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Work here; default build/demo.")
@told
def demo(report: Path | None, short: bool, folder: Path | None) -> None:
    """Show it all on this machine: compile, sign, roll out under load, stop bad versions and undo them."""
    from edgefleet_controller.demo.story import run

    sys.exit(run(folder or Path("build/demo"), report, short=short))
