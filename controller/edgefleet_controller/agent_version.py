"""Stages 1 to 3 for the agent itself: receives its wheels, hands on one artifact per device class, released like a model.

A version of the agent is one zip of pure Python: the two distributions as they are in their wheels. Native libraries belong to the board's
package; what the wheels say they need of it becomes the artifact's requirement, so that a board whose package lacks it refuses before
it downloads. The same wheels always give the same bytes, and every class the same zip, which is sent to all boards once.
"""

from __future__ import annotations

import email.parser
import io
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from edgefleet_shared import artifact
from edgefleet_shared.artifact import SCHEMA, AgentConfig, Layout
from edgefleet_shared.assignment import AGENT
from edgefleet_shared.clock import SystemClock
from edgefleet_shared.errors import InputError, NotFoundError
from edgefleet_shared.fingerprint import Requirement, readable_bounds
from edgefleet_shared.topics import check_name

from edgefleet_controller import release
from edgefleet_controller.client import FleetClient
from edgefleet_controller.compile.workplace import work_folder
from edgefleet_controller.sign import ReleaseSigner

PACKAGES = {"edgefleet-agent": "edgefleet_agent", "edgefleet-shared": "edgefleet_shared"}
NEEDED = (
    "edgefleet_agent/cli.py",
    "edgefleet_agent/rehearsal.py",
)  # what the launcher starts, what the version before it calls
LAUNCHER_BOUNDS = ">=1"  # the launcher's contract that a version is started by
MAX_WHEEL_BYTES = 16 * 1024 * 1024
_SUFFIXES = (".py", ".proto", ".typed")
_METADATA = ("METADATA", "entry_points.txt")
_REQUIREMENT = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^\]]*)\])?\s*([^;]*?)\s*(?:;\s*(.*))?$")
_EXTRA = re.compile(r"""^(?:(.*)\s+and\s+)?extra\s*==\s*['"]([^'"]+)['"]$""")


class _Need(NamedTuple):
    """One line of ``Requires-Dist``. ``where`` is what must hold of the board for it, beside the extra."""

    line: str
    name: str
    extras: frozenset[str]
    bounds: str
    extra: str
    where: str


class _Wheel(NamedTuple):
    """A wheel that is one of ours."""

    name: str
    version: str
    python: str
    needs: tuple[_Need, ...]
    files: dict[str, bytes]


def build(wheels: Iterable[Path], classes: Iterable[str], layout: Layout) -> list[str]:
    """Write the artifact of each class.

    Args:
        wheels: of edgefleet-agent and edgefleet-shared.
        layout: where the artifacts go.

    Returns:
        the manifests' digests, in the order of ``classes``.

    Raises:
        InputError: these are other wheels, or ones that can't run out of a zip.
    """
    found = {wheel.name: wheel for wheel in map(_read, wheels)}
    if set(found) != set(PACKAGES):
        raise InputError(
            f"a version of the agent is made of two wheels, {' and '.join(PACKAGES)}; given: {', '.join(sorted(found)) or 'none'}",
            hint="pip wheel --no-deps ./shared ./agent",
        )
    agent, shared = found["edgefleet-agent"], found["edgefleet-shared"]
    version = check_name(agent.version, "version")
    files = agent.files | shared.files
    missing = [name for name in NEEDED if name not in files]
    if missing:
        raise InputError(f"the wheel of edgefleet-agent lacks {', '.join(missing)}")
    requires = Requirement(provides=_provides(agent, shared))
    code = _zipped(files)
    return [
        artifact.build_agent(
            layout, AgentConfig(schema=SCHEMA, version=version, device_class=name, requires=requires), code
        ).digest
        for name in classes
    ]


def add(home: Path, wheels: tuple[Path, ...], classes: tuple[str, ...], keys: Path | None) -> dict[str, Any]:
    """Build, upload, register, and sign with the release keys.

    Args:
        classes: empty for every registered one.
        keys: folder of the release keys; None to leave it unsigned.

    Returns:
        the version as the controller lists it.

    Raises:
        EdgefleetError
    """
    client = FleetClient(home)
    wanted = classes or tuple(c["metadata"]["name"] for c in client.classes())
    if not wanted:
        raise NotFoundError("no device class is registered", hint="fleet apply -f manifests/")
    with work_folder("agent") as staging:
        layout = Layout(staging)
        manifests = build(wheels, wanted, layout)
        blobs = [blob.digest for manifest in manifests for blob in layout.manifest(manifest).blobs()]
        client.upload(layout, [*dict.fromkeys(blobs), *manifests])
    added = client.add_agent(manifests)
    if keys is not None:
        signer = ReleaseSigner(keys, SystemClock())
        for made in added["artifacts"]:
            if made["state"] != "signed":
                release.sign(client, signer, AGENT, added["version"], made)
        added = next(a for a in client.agents() if a["version"] == added["version"])
    client.close()
    return dict(added)


def _read(path: Path) -> _Wheel:
    try:
        if path.stat().st_size > MAX_WHEEL_BYTES:
            raise InputError(f"{path} is larger than the {MAX_WHEEL_BYTES} bytes that a wheel of ours may have")
        with zipfile.ZipFile(path) as wheel:
            entries = [entry for entry in wheel.infolist() if not entry.is_dir()]
            if sum(entry.file_size for entry in entries) > 4 * MAX_WHEEL_BYTES:
                raise InputError(f"{path} unpacks to more than a wheel of ours may hold")
            content = {entry.filename: wheel.read(entry) for entry in entries}
    except FileNotFoundError as exc:
        raise NotFoundError(f"there is no {path}") from exc
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as exc:
        raise InputError(f"{path} is not a wheel: {exc}") from exc
    metadata = [name for name in content if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
    if len(metadata) != 1:
        raise InputError(f"{path} is not a wheel: it has {len(metadata)} METADATA files")
    told = email.parser.BytesParser().parsebytes(content[metadata[0]])
    name = re.sub(r"[-_.]+", "-", str(told["Name"])).lower()
    if name not in PACKAGES:
        raise InputError(f"{path} is a wheel of {name}, not of {' or '.join(PACKAGES)}")
    folder = metadata[0].rpartition("/")[0]
    files = {f: c for f, c in content.items() if not f.startswith(f"{folder}/") or f.rpartition("/")[2] in _METADATA}
    for file in files:
        if not file.startswith((f"{PACKAGES[name]}/", f"{folder}/")) or ".." in file.split("/"):
            raise InputError(f"{path} holds {file}, outside of {PACKAGES[name]}")
    native = sorted(f for f in files if f.startswith(f"{PACKAGES[name]}/") and not f.endswith(_SUFFIXES))
    # Unit files are the package's; they lie in the wheel, and are left out.
    compiled = [f for f in native if f.endswith((".so", ".pyd", ".pyc"))]
    if compiled:
        raise InputError(f"{path} holds {compiled[0]}: native code belongs to the board's package")
    needs = tuple(_need(path, str(line)) for line in told.get_all("Requires-Dist", []))
    return _Wheel(
        name, str(told["Version"]), str(told["Requires-Python"] or ""), needs,
        {f: c for f, c in files.items() if f not in native},
    )  # fmt: skip


def _need(path: Path, line: str) -> _Need:
    match = _REQUIREMENT.match(line)
    if match is None:
        raise InputError(f"{path} needs {line!r}, which a board can't be held against")
    marker = match.group(4) or ""
    found = _EXTRA.match(marker)
    where, extra = (found.group(1) or "", found.group(2)) if found else (marker, "")
    name = re.sub(r"[-_.]+", "-", match.group(1)).lower()
    extras = frozenset(part.strip() for part in (match.group(2) or "").split(",") if part.strip())
    return _Need(line, name, extras, match.group(3).strip("() "), extra, where)


def _provides(agent: _Wheel, shared: _Wheel) -> dict[str, str]:
    """What a board's package must bring: Python, a launcher, and whatever both distributions need."""
    chosen = frozenset(e for need in agent.needs if need.name == shared.name and not need.extra for e in need.extras)
    wanted = {"python": agent.python, "launcher": LAUNCHER_BOUNDS}
    for needs, extras in ((agent.needs, frozenset[str]()), (shared.needs, chosen)):
        for need in needs:
            if need.extra and need.extra not in extras:
                continue  # an engine's, say: the board's package has what the board has
            if need.where:
                raise InputError(f"the wheels need {need.line!r}, which a board can't be held against")
            if need.name not in PACKAGES:
                both = [*wanted.get(need.name, "").split(","), *need.bounds.replace(" ", "").split(",")]
                wanted[need.name] = ",".join(dict.fromkeys(filter(None, both)))
    for name, bounds in wanted.items():
        if not readable_bounds(bounds):
            raise InputError(f"the wheels need {name} {bounds}, which a board can't be held against")
    return wanted


def _zipped(files: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as made:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            made.writestr(entry, files[name])
    return target.getvalue()
