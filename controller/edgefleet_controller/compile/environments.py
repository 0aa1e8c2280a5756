"""Stage 2, compile: environments. Receives a lock, hands on an installed environment, or what is wrong with one.

An environment lies in ``<cache>/toolchains/<name>-<hash of lock, Python and machine>``. It is whole once the file
``edgefleet-toolchain.json`` in it names every package that pip put there: a folder without that file is half installed and is made
anew. Locks are complete, so pip resolves nothing. torch comes in another build from each index: it is pinned by version, at the lock's end
(ADR 0013).
"""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import threading
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import msgspec
from edgefleet_shared import atomic
from edgefleet_shared.artifact import digest_file
from edgefleet_shared.errors import EnvironmentProblem, ToolchainUnusable
from edgefleet_shared.malformed import MALFORMED

from edgefleet_controller.compile.watching import Child, last_line, last_words, watch

Progress = Callable[[str, int, int], None]

MARKER = "edgefleet-toolchain.json"
INSTALL_LIMIT_S = 1800
BY_VERSION = (
    "# by version only:"  # of what follows in a lock, builds differ by accelerator and index: no hash holds for all
)
SPARE_BYTES = 1_000_000
_FULL = ("No space left on device", "Errno 28", "Disk quota exceeded", "Errno 122")
# Megabytes of each environment on disk, as installed on Linux x86-64 with Python 3.11: said before, and asked of the disk.
NEEDS_MB = {
    "onnxruntime": 350,
    "tflite": 420,
    "openvino": 720,
    "iree": 620,
    "rknn": 1460,
    "tensorrt-rtx": 520,
    "ncnn": 250,
    "hls4ml": 360,
    "pruning": 1010,
    "keras": 1750,
}


class Lock(msgspec.Struct, frozen=True):
    """What an environment is made from: requirements with hashes, and, behind :data:`BY_VERSION`, those that are pinned by version only."""

    name: str
    text: str

    @property
    def hash(self) -> str:
        """Short hash over the lock, Python's version and the machine: what decides the environment's content."""
        return hash_of_lock(self.text)

    @property
    def hashed(self) -> str:
        return self.text.partition(BY_VERSION)[0]

    @property
    def by_version(self) -> list[str]:
        return self.text.partition(BY_VERSION)[2].split()

    @property
    def names(self) -> set[str]:
        """The packages that it names, some of them perhaps for other Pythons only."""
        pinned = re.findall(r"^([^\s=\[]+)\S*==", self.hashed, re.M) + [
            one.partition("==")[0] for one in self.by_version
        ]
        return {_normal(name) for name in pinned}

    @property
    def count(self) -> int:
        """How many packages it names."""
        return len(self.names)

    def of(self, packages: dict[str, str]) -> dict[str, str]:
        """Those of an environment's packages that the lock put there. The others (pip) came with this machine's Python, and
        what is compiled does not depend on them."""
        return {name: version for name, version in packages.items() if _normal(name) in self.names}


class State(msgspec.Struct, frozen=True, kw_only=True):
    """How one environment stands. ``problem`` is empty where it is whole; ``installed`` is also true of a broken one."""

    name: str
    folder: str
    lock: str
    installed: bool
    problem: str
    packages: dict[str, str]
    size_bytes: int
    needs_bytes: int


def _normal(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lock_named(name: str) -> Lock:
    """A lock of this build.

    Raises:
        ToolchainUnusable: it has none of that name.
    """
    folder = resources.files("edgefleet_controller.compile") / "locks"
    lock = folder / f"{name}.txt"
    if not lock.is_file():
        have = sorted(entry.name.removesuffix(".txt") for entry in folder.iterdir() if entry.name.endswith(".txt"))
        raise ToolchainUnusable(f"no toolchain {name!r} in this build; it has: {', '.join(have)}")
    return Lock(name, lock.read_text())


def hash_of_lock(lock: str) -> str:
    """See :attr:`Lock.hash`."""
    what = f"{lock}\n{sys.version_info[:2]}\n{platform.machine()}"
    return hashlib.sha256(what.encode()).hexdigest()[:12]


def folder_of(root: Path, lock: Lock) -> Path:
    """Where the environment of a lock lies, or will."""
    return root / f"{lock.name}-{lock.hash}"


def packages_of(folder: Path) -> dict[str, str]:
    """Name and version of everything in the environment, as its metadata has it now."""
    found: dict[str, str] = {}
    for entry in sorted(folder.glob("lib/python*/site-packages/*.dist-info")):
        name, _, version = entry.name.removesuffix(".dist-info").rpartition("-")
        found[name] = version
    return found


def whole(folder: Path) -> dict[str, str]:
    """The packages of an installed environment, after a look that costs a millisecond.

    Raises:
        ToolchainUnusable: its Python, or a package, is gone or has another version than was installed.
    """
    problem = _quick_problem(folder)
    if problem:
        name = folder.name.rpartition("-")[0]
        raise ToolchainUnusable(
            f"the {name} toolchain is broken: {problem}", hint=f"fleet toolchain install {name} --again"
        )
    found: dict[str, str] = json.loads((folder / MARKER).read_text())
    return found


def examine(root: Path, lock: Lock, *, every_byte: bool = False) -> State:
    """Look at every file of an environment (a second or so for the largest), or at every byte of each (some seconds)."""
    folder = folder_of(root, lock)
    problem = ""
    if not folder.is_dir():
        problem = "not installed"
    elif not (folder / MARKER).exists():
        problem = "half installed; the next use installs it anew"
    else:
        problem = _quick_problem(folder) or _damage(folder, every_byte=every_byte)
    return State(
        name=lock.name,
        folder=str(folder),
        lock=lock.hash,
        installed=(folder / MARKER).exists(),
        problem=problem,
        packages=packages_of(folder),
        size_bytes=_size_bytes(folder),
        needs_bytes=NEEDS_MB.get(lock.name, 0) * 1_000_000,
    )


def install(root: Path, lock: Lock, cancel: threading.Event, progress: Progress) -> None:
    """Make an environment; one that stands in its place comes back when that fails, where the disk holds both. The caller holds its file lock.

    Raises:
        EnvironmentProblem: the disk is, or will be, full. ToolchainUnusable: pip's reason. Cancelled.
    """
    folder, log = folder_of(root, lock), root / f"{lock.name}-{lock.hash}.log"
    before = folder.with_name(f".{folder.name}-before")
    log.unlink(missing_ok=True)
    shutil.rmtree(before, ignore_errors=True)  # of an installation that was killed
    needs = NEEDS_MB.get(lock.name, 0) * 1_000_000
    if (folder / MARKER).exists() and shutil.disk_usage(root).free > needs + SPARE_BYTES:
        os.replace(folder, before)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(root).free
    if free < needs:
        raise EnvironmentProblem(
            f"the {lock.name} toolchain takes {needs / 1e6:.0f} MB, and {root} has {free / 1e6:.0f} MB left",
            hint="make room, or let EDGEFLEET_CACHE name a folder on another disk",
        )
    try:
        folder.mkdir(parents=True)
        _fill(folder, lock, log, cancel, progress)
        atomic.write(folder / MARKER, json.dumps(packages_of(folder)).encode())
    except BaseException as exc:
        shutil.rmtree(folder, ignore_errors=True)  # half an environment only takes room
        if before.is_dir():
            os.replace(before, folder)
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(lock, root) from exc
        raise
    shutil.rmtree(before, ignore_errors=True)


def _fill(folder: Path, lock: Lock, log: Path, cancel: threading.Event, progress: Progress) -> None:
    total, done = lock.count, 0
    doing = f"installing the {lock.name} toolchain"
    progress(doing, 0, total)

    def line(text: bytes) -> None:
        nonlocal done
        told = text.decode(errors="replace").split()
        if told[:1] in (
            ["Collecting"],
            ["Processing"],
        ):  # a package of an index, and a file of one that lies on this machine
            done = min(done + 1, total)
            name = Path(told[1]).name.partition("=")[0].partition("-py")[0]
            progress(f"{doing}: {name}", done, total)
        elif told[:1] == ["Installing"]:
            progress(f"{doing}: unpacking", done, total)

    # Isolated: pip leaves out what it finds on PYTHONPATH, where no job looks.
    pip = [str(folder / "bin" / "python"), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]  # fmt: skip
    (folder / "lock.txt").write_text(lock.hashed)
    commands = [
        [sys.executable, "-I", "-m", "venv", str(folder)],
        [*pip, "--require-hashes", "--requirement", str(folder / "lock.txt")],
    ]
    if lock.by_version:
        commands.append([*pip, *lock.by_version])
    for command in commands:
        # pip needs what the user set: index, proxy, certificates.
        child = Child(
            name=doing, command=command, environment=dict(os.environ), folder=folder, log=log, limit_s=INSTALL_LIMIT_S
        )
        if watch(child, line, cancel) != 0:
            raise _failure(lock, log)
    progress(doing, total, total)


def _failure(lock: Lock, log: Path) -> EnvironmentProblem | ToolchainUnusable:
    text = last_words(log)
    # On a full disk the log may be empty too.
    if any(words in text for words in _FULL) or shutil.disk_usage(log.parent).free < SPARE_BYTES:
        return _disk_full(lock, log.parent)
    # pip's own sentence, where it has one; the last line is often only a part of it.
    said = re.findall(r"^ERROR: (.+)$", text, re.M)
    return ToolchainUnusable(
        f"can't install the {lock.name} toolchain: {said[-1][:400] if said else last_line(log)}",
        hint=f"see {log}; needed are a line to the package index, disk space, and Python's venv module",
    )


def _disk_full(lock: Lock, root: Path) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"the disk is full: the {lock.name} toolchain can't be installed in {root}",
        hint="make room, or let EDGEFLEET_CACHE name a folder on another disk",
    )


def _quick_problem(folder: Path) -> str:
    if not os.access(folder / "bin" / "python", os.X_OK):
        return "its Python is gone"
    try:
        wanted = msgspec.json.decode((folder / MARKER).read_bytes(), type=dict[str, str])
    except (OSError, *MALFORMED) as exc:
        return f"{MARKER} can't be read: {exc}"
    found = packages_of(folder)
    for name, version in wanted.items():
        if name not in found:
            return f"the package {name} is gone"
        if found[name] != version:
            return f"the package {name} has version {found[name]}, not {version} as its lock says"
    return ""


def _damage(folder: Path, *, every_byte: bool) -> str:
    """The first file that is gone or is another than its package's RECORD says, or nothing."""
    for record in sorted(folder.glob("lib/python*/site-packages/*.dist-info/RECORD")):
        base = record.parent.parent
        with record.open(newline="", encoding="utf-8") as stream:
            for row in csv.reader(stream):
                if not row or "__pycache__" in row[0]:
                    continue
                try:
                    size = (base / row[0]).stat().st_size
                except OSError:
                    return f"the file {row[0]} is gone"
                if len(row) > 2 and row[2] and int(row[2]) != size:
                    return f"the file {row[0]} has {size} bytes, not {row[2]}"
                if every_byte and len(row) > 1 and row[1].startswith("sha256=") and row[1] != _hash(base / row[0]):
                    return f"the file {row[0]} has other bytes than were installed"
    return ""


def _hash(file: Path) -> str:
    """As RECORD has it (PEP 376, PEP 427)."""
    digest = bytes.fromhex(digest_file(file).partition(":")[2])
    return "sha256=" + base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _size_bytes(folder: Path) -> int:
    return sum(
        entry.stat(follow_symlinks=False).st_size
        for entry in folder.rglob("*")
        if entry.is_file() or entry.is_symlink()
    )
