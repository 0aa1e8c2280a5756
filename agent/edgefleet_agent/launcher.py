"""Stage 8 for the agent itself: the launcher. Receives the agent's slots on disk, hands on the process: it becomes the version to run.

::

    <state>/agent/slots.json   which version is active, candidate, previous (slots.py)
    <state>/agent/artifacts/   OCI layout, one zip of pure Python per version
    <state>/agent/trial.json   the last version that was given a trial: starts so far, time limit, the package it was tried on

Part of the board's package and never changed by an update; the standard library and our own way to write, nothing else. It decides
by :data:`ORDER`, checks every byte of what it starts, counts a start on trial durably *before* it, and sets an alarm that outlives
``exec``: a version that hangs is ended by the kernel whatever it does. The package's own version is the last resort, always there.

Not handled here: starting again what ended (systemd), what a version must show on its trial (:mod:`edgefleet_agent.selfupdate`).
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from edgefleet_shared import atomic, streams
from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.files import DISK, FileSystem

from edgefleet_agent import __version__

LAUNCHER = "1"  # what a version may expect of its launcher; rises when this module's contract changes
STARTS = 3  # that a version on trial is given to prove itself
LATE_STARTS = 10  # that a committed version is given in a row without having settled in between
SETTLED_S = 60.0  # a version that has run so long has settled, whether it reaches anybody or not
LIMIT_MOST_S = 86_400.0  # of a trial; no version is given a fraction of it
ALARM_FACTOR = 1.5  # of the trial's limit: the version itself gives up first, and says why
CODE_LAYER = (
    "application/vnd.edgefleet.agent.code.v1+zip"  # as in edgefleet_shared.artifact, which needs more than we may
)
MANIFEST_VARIABLE, LAUNCHER_VARIABLE, PACKAGE_VARIABLE = "EDGEFLEET_AGENT", "EDGEFLEET_LAUNCHER", "EDGEFLEET_PACKAGE"

# (status of the active slot, whether it has starts left) -> what to start, the first that is whole. The package comes last, always.
ORDER: dict[tuple[str, bool], tuple[str, ...]] = {
    ("none", False): (),
    ("none", True): (),
    ("good", True): ("active", "previous"),
    ("good", False): ("previous",),  # it was committed and keeps ending
    ("unknown", True): ("active", "previous"),
    ("unknown", False): ("previous",),
    ("bad", False): ("previous",),
    ("bad", True): ("previous",),
}


class Trial(NamedTuple):
    """A version's trial, and its starts since it settled last. ``package`` is the package's version that it was tried on: it holds
    for no other."""

    manifest: str
    limit_s: float
    package: str
    starts: int = 0


class Choice(NamedTuple):
    """What to start: ``manifest`` and ``code`` (the zip) are empty for the package's own version; ``alarm_s`` 0 for none."""

    manifest: str = ""
    code: str = ""
    alarm_s: float = 0.0


def folder(state: Path) -> Path:
    """Where the agent keeps its own versions, in a board's state folder."""
    return state / "agent"


def read_trial(state: Path, *, files: FileSystem = DISK) -> Trial | None:
    """The record of the last trial; None when there is none, or none that can be read."""
    found = _object(folder(state) / "trial.json", files)
    try:
        trial = Trial(str(found["manifest"]), float(found["limit_s"]), str(found["package"]), int(found["starts"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    # Whatever they are, they must not end the launcher: it would be started again to the same end, for ever.
    return trial if 0 < trial.limit_s <= LIMIT_MOST_S and trial.starts >= 0 else None


def write_trial(state: Path, trial: Trial, *, files: FileSystem = DISK) -> None:
    """Keep the record, durably. Raises EnvironmentProblem."""
    import json  # here, as below, because the resident agent imports this module and seldom comes this way

    atomic.write(folder(state) / "trial.json", json.dumps(trial._asdict()).encode(), files=files)


def settle(state: Path, manifest: str, *, files: FileSystem = DISK) -> None:
    """A committed version has run for :data:`SETTLED_S`: its starts are counted anew. Raises EnvironmentProblem."""
    trial = read_trial(state, files=files)
    active, status = _slot(_object(folder(state) / "slots.json", files), "active")
    if trial is not None and trial.starts and active == manifest == trial.manifest and status == "good":
        write_trial(state, trial._replace(starts=0), files=files)


def choose(state: Path, package: str = __version__, *, counting: bool = True, files: FileSystem = DISK) -> Choice:
    """Decide what to start, and count the start.

    Args:
        package: the version of the package that this launcher came with.
        counting: False to ask what would be started, and change nothing.

    Returns:
        the first version in order of which every byte is there. A start on trial that can't be counted is not made.
    """
    slots, trial = _object(folder(state) / "slots.json", files), read_trial(state, files=files)
    if trial is None or trial.package != package:
        return Choice()  # another package came: whoever installed it meant its version
    active, status = _slot(slots, "active")
    if status == "good" and trial.manifest != active:
        trial = trial._replace(manifest=active, starts=0)  # it is active again, after another one's trial
    is_open = trial.manifest == active and trial.starts < (STARTS if status == "unknown" else LATE_STARTS)
    for name in ORDER.get((status, is_open), ()):
        manifest, status = _slot(slots, name)
        on_trial = name == "active" and status == "unknown"
        if status != "good" and not on_trial:
            continue
        code = code_of(state, manifest, files=files)
        if not code:
            continue
        # The starts of a version that is only fallen back to are not counted: the record must go on telling of the other one.
        counted = not counting or name != "active" or _counted(state, trial, files)
        if on_trial and not counted:
            continue
        return Choice(manifest, code, trial.limit_s * ALARM_FACTOR if on_trial else 0.0)
    return Choice()


def _counted(state: Path, trial: Trial, files: FileSystem) -> bool:
    try:
        write_trial(state, trial._replace(starts=trial.starts + 1), files=files)
    except EdgefleetError:
        return False
    return True


def _slot(slots: dict[str, Any], name: str) -> tuple[str, str]:
    slot = slots.get(name)
    if not isinstance(slot, dict):
        return "", "none"
    return str(slot.get("manifest")), str(slot.get("status"))


def _object(path: Path, files: FileSystem) -> dict[str, Any]:
    try:
        content = atomic.read(path, files=files)
    except (OSError, EdgefleetError):
        return {}  # as a rule: most boards run the package's version
    import json

    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def code_of(state: Path, manifest: str, *, files: FileSystem = DISK) -> str:
    """The path of a version's zip, when manifest and zip are to the byte what their digests say; else empty."""
    import json

    own = folder(state)
    content = _blob(own, manifest, files)
    try:
        layers = [layer for layer in json.loads(content)["layers"] if layer["mediaType"] == CODE_LAYER]
        digest = str(layers[0]["digest"])
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return ""
    return str(_path(own, digest)) if _is_whole(own, digest, files) else ""


def _is_whole(own: Path, digest: str, files: FileSystem) -> bool:
    """Piece by piece: a version that does not fit the memory must not end the launcher before it has counted the start."""
    path, state = _path(own, digest), hashlib.sha256()
    try:
        for piece in atomic.pieces(path, files=files) if path else ():
            state.update(piece)
    except (OSError, EdgefleetError):
        return False
    return f"sha256:{state.hexdigest()}" == digest


def _blob(own: Path, digest: str, files: FileSystem) -> bytes:
    path = _path(own, digest)
    try:
        content = atomic.read(path, files=files) if path else b""
    except (OSError, EdgefleetError):
        return b""
    return content if f"sha256:{hashlib.sha256(content).hexdigest()}" == digest else b""


def _path(own: Path, digest: str) -> Path | None:
    algorithm, _, name = digest.partition(":")
    if algorithm != "sha256" or len(name) != 64 or not set(name) <= set("0123456789abcdef"):
        return None
    return own / "artifacts" / "blobs" / "sha256" / name


def start(state: Path, choice: Choice) -> NoReturn:
    """Become the chosen version. The process stays the same, so whoever watches it goes on watching."""
    environment = os.environ | {
        MANIFEST_VARIABLE: choice.manifest, LAUNCHER_VARIABLE: LAUNCHER, PACKAGE_VARIABLE: __version__,
    }  # fmt: skip
    if choice.code:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [choice.code, os.environ.get("PYTHONPATH", "")]))
    told = (
        f"{choice.manifest}, on trial" if choice.alarm_s else choice.manifest or f"the package's version, {__version__}"
    )
    sys.stderr.write(f"fleet-agent-launch: starting {told}\n")
    # alarm(2) survives execve(2), and its action is the default one again there: to end the process.
    signal.setitimer(signal.ITIMER_REAL, choice.alarm_s)
    os.chdir("/")  # nothing is imported from where we happen to be
    os.execve(  # noqa: S606 - our own interpreter
        sys.executable, [sys.executable, "-m", "edgefleet_agent.cli", "run", "--state", str(state)], environment
    )


def main() -> NoReturn:
    """``fleet-agent-launch --state STATE``."""
    import argparse  # the resident agent imports this module too, and needs no command line

    streams.hold()  # what we become has them too
    parser = argparse.ArgumentParser(
        prog="fleet-agent-launch", description="Start the version of the agent that is to run."
    )
    parser.add_argument("--state", type=Path, default=Path("/var/lib/edgefleet"), help="the board's state folder")
    state = parser.parse_args().state.resolve()
    start(state, choose(state))


if __name__ == "__main__":
    main()
