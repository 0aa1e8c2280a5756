"""``fleet-agent``: the board's command line. A face, no logic."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import msgspec
from edgefleet_shared.faces import told

from edgefleet_agent import __version__

# How glibc's mallopt(3) is told, before main, to give back what is free: a third of a megabyte of a process that has a few threads and
# does little. Its children, which compute, do not inherit it (:func:`edgefleet_agent.sandbox.child_environment`).
FRUGAL = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "16384",
    "MALLOC_TRIM_THRESHOLD_": "32768",
    "MALLOC_TOP_PAD_": "8192",
}

state_option = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="EDGEFLEET_STATE",
    default=Path("/var/lib/edgefleet"),
    show_default=True,
    help="The board's state folder.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fleet-agent")
def main() -> None:
    """The edgefleet agent of one board.

    It reconciles the board to its signed assignment: fetch, verify, accept on this very board, swap, soak, commit or roll
    back. Models are served by fleet-runtime, which goes on without the agent.
    """


@main.command()
@click.option("--url", envvar="EDGEFLEET_URL", required=True, help="The controller, https://host:port.")
@click.option("--token", envvar="EDGEFLEET_TOKEN", help="The one-time enrolment token.")
@click.option(
    "--token-file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A file that holds the token."
)
@click.option("--name", default="", help="The board's name; not needed when the token fixes it.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="CPU threads that one inference may use.",
)
@click.option(
    "--health-period",
    type=click.FloatRange(min=0.5),
    default=10.0,
    show_default=True,
    help="Seconds between two health reports.",
)
@click.option("--again", is_flag=True, help="A board that is enrolled, as the one that it is; its models stay.")
@state_option
@json_option
@told
def enroll(
    url: str,
    token: str | None,
    token_file: Path | None,
    name: str,
    threads: int,
    health_period: float,
    again: bool,
    state: Path,
    as_json: bool,
) -> None:
    """Enrol this board: a key is made here, the controller certifies it."""
    from edgefleet_agent.enroll import enroll as enrol_board

    if token_file is not None:
        token = token_file.read_text(errors="replace")
    if not token:
        raise click.UsageError("give the enrolment token by --token, --token-file or EDGEFLEET_TOKEN")
    _become_owner(state)
    settings = enrol_board(state, url, token, name, threads=threads, health_period_s=health_period, again=again)
    if as_json:
        click.echo(msgspec.json.encode(settings).decode())
    else:
        click.echo(f"enrolled as {settings.device}, class {settings.device_class}; start it: fleet-agent run")


@main.command()
@state_option
@told
def measure(state: Path) -> None:
    """Measure candidates for the compiler, as a builder board of a class, until SIGTERM.

    Enrol it by a token of `fleet worker token --class`, in a state folder of its own. It serves nothing and installs nothing.
    """
    from edgefleet_shared import logs

    from edgefleet_agent import builder

    logs.configure()
    builder.run(state)


def _become_owner(state: Path) -> None:
    """Go on as whoever owns the state folder: root enrols a board, but the agent must be able to read what that leaves behind."""
    if os.geteuid() != 0 or not state.exists():
        return
    owner = state.stat()
    if owner.st_uid != 0:
        os.setgroups([])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)


@main.command()
@state_option
@told
def run(state: Path) -> None:
    """Run the agent until it is stopped."""
    # A program of its own: what reads command lines is two megabytes that a process need not keep for as long as the board runs.
    os.execve(  # noqa: S606 - our own interpreter
        sys.executable,
        [sys.executable, "-X", "no_debug_ranges", "-m", "edgefleet_agent.resident", str(state.resolve())],
        {**FRUGAL, **os.environ},
    )


@main.command()
@state_option
@json_option
@told
def status(state: Path, as_json: bool) -> None:
    """Say what this board serves and what it is doing."""
    from edgefleet_agent.doctor import describe

    told = describe(state)
    if as_json:
        click.echo(msgspec.json.encode(told).decode())
        return
    for key, value in told.items():
        click.echo(f"{key:18} {value if value not in (None, '') else '-'}")


@main.command()
@state_option
@json_option
@told
def doctor(state: Path, as_json: bool) -> None:
    """Check this board: state, certificates, engines, runtime, broker, disk. Ends with 1 when something is wrong."""
    from edgefleet_agent.doctor import examine

    findings = examine(state)
    if as_json:
        click.echo(msgspec.json.encode(findings).decode())
    else:
        for finding in findings:
            click.echo(f"{'ok  ' if finding.ok else 'BAD '} {finding.what}: {finding.detail}")
    if not all(finding.ok for finding in findings):
        sys.exit(1)


@main.command()
@state_option
@json_option
@click.option("--undo", is_flag=True, help="whatever serves: put back what was there before any profile")
@told
def power(state: Path, as_json: bool, undo: bool) -> None:
    """Apply the power profile of what serves, or undo it. For root: fleet-power.service runs this whenever the slots change."""
    from edgefleet_shared.artifact import PowerProfile

    from edgefleet_agent import power_profile

    profile = PowerProfile() if undo else power_profile.wanted(state)
    changed = power_profile.apply(profile)
    if as_json:
        click.echo(msgspec.json.encode({"profile": profile, "changed": changed}).decode())
    else:
        click.echo("\n".join(changed) or "nothing to change")


if __name__ == "__main__":
    main()
