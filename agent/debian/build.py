"""Builds the board's Debian packages: receives this repository, hands on ``.deb`` files.

``python agent/debian/build.py --out dist`` makes, for this machine's architecture or the one that ``--arch`` names:

- ``edgefleet-agent``: agent, runtime, units and user, with every Python dependency at its locked hash in a virtual environment below
  ``/usr/lib/edgefleet`` that nothing else on the board can disturb, not even dpkg: programs start from a copy that is made of what it has
  unpacked once that is whole (``switch``), so that an upgrade cut off anywhere leaves what ran before it;
- ``edgefleet-engine-ENGINE``, one per inference engine: what that engine adds to it;
- ``edgefleet-runtime-grpc``: what clients that speak gRPC need, with the units that it runs in.

The environment is Debian's own Python, whose minor version must be the one that runs this script: wheels are chosen for it. Needs pip,
hatchling (``requirements/build.txt``) and ``dpkg-deb``. Wheels of another architecture are fetched as such; nothing of it is run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PREFIX = Path("usr/lib/edgefleet")
MINOR = "{}.{}".format(*sys.version_info[:2])
UNPACKED = PREFIX / "unpacked"
SITE = UNPACKED / f"agent/lib/python{MINOR}/site-packages"
PATHS = PREFIX / "paths"  # .pth files: where else the environment finds packages; a board's owner may add some
ENGINES = ("onnxruntime", "litert", "openvino", "iree")
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}  # PyPI has no wheels of the engines for armhf
GLIBC = {"3.10": 35, "3.11": 36, "3.12": 39, "3.13": 41}  # of the Debian or Ubuntu release whose Python that is: 2.x
PROGRAMS = {
    "fleet-agent": "edgefleet_agent.cli",
    "fleet-agent-launch": "edgefleet_agent.launcher",
    "fleet-runtime": "edgefleet_agent.runtime.app",
}
UNITS = (
    "fleet-agent.service",
    "fleet-runtime.service",
    "fleet-runtime.socket",
    "fleet-power.service",
    "fleet-power.path",
    "fleet-power.timer",
)
GRPC_PROGRAMS = {"fleet-runtime-grpc": "edgefleet_agent.runtime.grpc_gateway"}
GRPC_UNITS = ("fleet-runtime-grpc.socket", "fleet-runtime-grpc.service")
SCRIPTS = ("postinst", "prerm", "postrm")


class Target(NamedTuple):
    """What is built for: Debian's name of the architecture, the packages' version, and how they are compressed."""

    arch: str
    version: str
    compression: str


def main() -> None:
    """Build, and print the path of each package."""
    parser = argparse.ArgumentParser(description="Build the board's Debian packages.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the packages go")
    parser.add_argument(
        "--arch", choices=sorted(MACHINES), default=_own_arch(), help="Debian's name of the architecture"
    )
    parser.add_argument("--engine", action="append", choices=ENGINES, help="only these engines; may be repeated")
    parser.add_argument("--version", default=_version(), help="default: the agent's")
    parser.add_argument("--compression", choices=("xz", "none"), default="xz", help="none is faster, for a try-out")
    chosen = parser.parse_args()
    target = Target(chosen.arch, chosen.version, chosen.compression)
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="edgefleet-deb-") as folder:
        agent = Path(folder) / "agent"
        _install(ROOT / "requirements" / "agent.txt", agent / SITE, target)
        _own_wheels(agent / SITE)
        held = _installed(agent / SITE)
        _agent(agent, target)
        packages = [_pack(agent, "edgefleet-agent", target, chosen.out)]
        for engine in chosen.engine or ENGINES:
            tree = Path(folder) / engine
            _engine(tree, engine, target, held)
            packages.append(_pack(tree, f"edgefleet-engine-{engine}", target, chosen.out))
        grpc = Path(folder) / "grpc"
        _grpc(grpc, target, held)
        packages.append(_pack(grpc, "edgefleet-runtime-grpc", target, chosen.out))
    sys.stdout.write("".join(f"{path}\n" for path in packages))


def _own_arch() -> str:
    own = {machine: arch for arch, machine in MACHINES.items()}
    return own.get(platform.machine(), "amd64")


def _version() -> str:
    return importlib.metadata.version("edgefleet-agent")


def _install(lock: Path, site: Path, target: Target) -> None:
    """The wheels of a lock, each at its hash, for the target rather than for this machine."""
    machine = MACHINES[target.arch]
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC[MINOR], 16, -1)] + [
        f"manylinux2014_{machine}"
    ]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run(
        [*pip, "--require-hashes", "--only-binary=:all:", "--no-deps", "--implementation=cp",
         f"--python-version={MINOR}", *(f"--platform={p}" for p in platforms), f"--target={site}", f"--requirement={lock}"],
        check=True,
    )  # fmt: skip
    shutil.rmtree(site / "bin", ignore_errors=True)


def _own_wheels(site: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    own = [str(ROOT / name) for name in ("shared", "agent")]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", f"--target={site}", *own], check=True)
    shutil.rmtree(site / "bin", ignore_errors=True)


def _installed(site: Path) -> dict[str, str]:
    """Distribution -> version of what lies in a folder."""
    return dict(folder.name.removesuffix(".dist-info").rsplit("-", 1) for folder in site.glob("*.dist-info"))


def _agent(tree: Path, target: Target) -> None:
    _environment(tree / UNPACKED / "agent")
    for folder in (PATHS, PREFIX / "in-use"):
        (tree / folder).mkdir()
    (tree / SITE / "edgefleet.pth").write_text(f'import site; site.addsitedir("/{PATHS}")\n')
    shutil.copy(HERE / "switch", tree / PREFIX)
    _programs(tree, "agent", PROGRAMS)
    _units(tree, UNITS)
    users = tree / "usr/lib/sysusers.d"
    users.mkdir(parents=True)
    shutil.copy(HERE / "edgefleet.sysusers", users / "edgefleet.conf")
    _document(tree, "edgefleet-agent")
    _control(
        tree, "edgefleet-agent", target,
        depends=f"python{MINOR}, libstdc++6, systemd",
        recommends=" | ".join(f"edgefleet-engine-{engine}" for engine in ENGINES),
        summary="edgefleet: the agent and the inference runtime of a board",
        text="Keeps a board at its signed assignment: fetches compiled models, verifies them, proves on this very board that\n"
        "they run, swaps them into the running inference server, and reports. Enrol it with fleet-agent enroll.",
    )  # fmt: skip
    _scripts(tree, "edgefleet-agent", SCRIPTS)


def _programs(tree: Path, part: str, programs: dict[str, str]) -> None:
    """Each starts from the copies that are in use by then, and keeps to them whatever is installed meanwhile."""
    for folder in (Path("usr/bin"), UNPACKED / part / "bin"):
        (tree / folder).mkdir(parents=True, exist_ok=True)
    for name, module in programs.items():
        (tree / UNPACKED / part / "bin" / name).write_text(f"from {module} import main\n\nmain()\n")
        program = tree / "usr/bin" / name
        python, script = (f'"$(readlink -f /{PREFIX}/{of})/bin/{it}"' for of, it in (("agent", "python"), (part, name)))
        program.write_text(f'#!/bin/sh\nexec {python} {script} "$@"\n')
        program.chmod(0o755)


def _units(tree: Path, names: tuple[str, ...]) -> None:
    units = tree / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    for name in names:
        shutil.copy(ROOT / "agent/edgefleet_agent/systemd" / name, units)


def _scripts(tree: Path, source: str, names: tuple[str, ...]) -> None:
    for script in names:
        shutil.copy(HERE / f"{source}.{script}", tree / "DEBIAN" / script)
        (tree / "DEBIAN" / script).chmod(0o755)


def _environment(folder: Path) -> None:
    """A virtual environment as ``python -m venv`` makes it, for a Python that is not here."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to(f"/usr/bin/python{MINOR}")
    (folder / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {MINOR}\n")


def _engine(tree: Path, engine: str, target: Target, held: dict[str, str]) -> None:
    _added(tree, engine, f"edgefleet-engine-{engine}", target, held)
    _control(
        tree, f"edgefleet-engine-{engine}", target,
        depends=f"edgefleet-agent (= {target.version})", recommends="",
        summary=f"edgefleet: {engine} for the inference runtime of a board",
        text=f"The inference engine {engine}, at the version that the agent was released with.",
    )  # fmt: skip
    _scripts(tree, "edgefleet-engine", SCRIPTS)


def _grpc(tree: Path, target: Target, held: dict[str, str]) -> None:
    _added(tree, "grpc", "edgefleet-runtime-grpc", target, held)
    _programs(tree, "grpc", GRPC_PROGRAMS)
    _units(tree, GRPC_UNITS)
    _control(
        tree, "edgefleet-runtime-grpc", target,
        depends=f"edgefleet-agent (= {target.version})", recommends="",
        summary="edgefleet: the gRPC face of the inference runtime of a board",
        text="For applications that speak the Open Inference Protocol over gRPC. Started by the first of them that connects.",
    )  # fmt: skip
    _scripts(tree, "edgefleet-runtime-grpc", SCRIPTS)


def _added(tree: Path, what: str, package: str, target: Target, held: dict[str, str]) -> None:
    """A lock without what the agent's package holds, in a folder of its own on the environment's path."""
    folder = tree / UNPACKED / what
    _install(ROOT / "requirements" / f"agent-{what}.txt", folder, target)
    for name, version in _installed(folder).items():
        if name not in held:
            continue
        if held[name] != version:
            raise SystemExit(
                f"{what} wants {name} {version}, the agent's package holds {held[name]}: lock them together"
            )
        _take_out(folder, f"{name}-{version}.dist-info")
    path = tree / PATHS / f"{package}.pth"
    path.parent.mkdir(parents=True)
    # The copy itself rather than its name: what a process imports later is of the same one.
    path.write_text(f'import os, sys; sys.path += filter(os.path.isdir, [os.path.realpath("/{PREFIX}/{what}")])\n')
    _document(tree, package)


def _take_out(site: Path, dist_info: str) -> None:
    """Remove a distribution's files, by its RECORD."""
    for line in (site / dist_info / "RECORD").read_text().splitlines():
        (site / line.rsplit(",", 2)[0].strip('"')).unlink(missing_ok=True)
    shutil.rmtree(site / dist_info, ignore_errors=True)
    for folder in sorted((p for p in site.rglob("*") if p.is_dir()), key=lambda p: len(p.parts), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def _document(tree: Path, package: str) -> None:
    folder = tree / "usr/share/doc" / package
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "LICENSE", folder / "copyright")
    held = [{"name": n, "version": v} for n, v in sorted(_installed_below(tree).items())]
    (folder / "python-packages.json").write_text(json.dumps(held, indent=1) + "\n")


def _installed_below(tree: Path) -> dict[str, str]:
    folders = {folder.parent for folder in tree.rglob("*.dist-info")}
    return {name: version for folder in folders for name, version in _installed(folder).items()}


def _control(
    tree: Path, package: str, target: Target, *, depends: str, recommends: str, summary: str, text: str
) -> None:
    size = sum(path.lstat().st_size for path in tree.rglob("*") if path.is_file()) // 1024
    fields = {
        "Package": package,
        "Version": target.version,
        "Architecture": target.arch,
        "Maintainer": "the edgefleet developers <edgefleet@localhost>",
        "Section": "net",
        "Priority": "optional",
        "Installed-Size": str(size),
        "Depends": depends,
        "Recommends": recommends,
        "Description": summary + "".join(f"\n {line}" for line in text.splitlines()),
    }
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text("".join(f"{key}: {value}\n" for key, value in fields.items() if value))


def _pack(tree: Path, package: str, target: Target, out: Path) -> Path:
    made = out / f"{package}_{target.version}_{target.arch}.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", f"-Z{target.compression}", "--build", tree, made],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return made


if __name__ == "__main__":
    main()
