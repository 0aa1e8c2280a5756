"""Stage 2, compile: toolchains. Receives a lock's name, hands on an environment of its own and runs jobs in it.

Each toolchain lives in ``<cache>/toolchains/<name>-<hash of lock, Python and machine>``, installed on first use from the
hashed lock in ``locks/``: their pins contradict each other, so they share no environment, and none is the controller's. torch and what
else comes in another build from each index is pinned by version, at the lock's end.
A job is a child process in a session of its own with a JSON request, JSON lines back, a log file, and a time limit;
cancelling kills the whole session. Source of the arrangement: PEP 517's build environments.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from edgefleet_shared import errors
from edgefleet_shared.errors import ToolchainError

Progress = Callable[[str, int, int], None]

BY_VERSION = "# by version only:"  # of what follows in a lock, builds differ by accelerator and index, so that no hash holds for all
INSTALL_LIMIT_S = 1200
POLL_S = 0.05  # how often cancel, time and memory are looked at
_FOLDER = Path(__file__).parent
# onnxruntime, openvino and nncf report usage to their makers unless told not to. Hashes and threads are fixed so that the
# same inputs give the same bytes.
_JOB_ENVIRONMENT = {
    "ORT_DISABLE_TELEMETRY": "1", "NNCF_CI": "1", "DO_NOT_TRACK": "1",
    "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
_RUN = "import sys; sys.path.append(sys.argv[1]); from importlib import import_module; import_module('children.' + sys.argv[2]).main()"


class Cancelled(ToolchainError):
    """The operator, or the program's end, cancelled a compile."""

    code = "cancelled"


class ChildDied(ToolchainError):
    """A child crashed, or was killed because it outgrew its memory limit; ``how`` is for people."""

    code = "child_died"

    def __init__(self, name: str, how: str, log: str) -> None:
        self.how = how
        super().__init__(f"the {name} process died: {how}", hint=log)


class Toolchain(msgspec.Struct, frozen=True):
    """An installed environment. ``lock_hash`` stands for every version in it and is part of a compile's cache key."""

    name: str
    python: str
    lock_hash: str
    packages: dict[str, str]


class Toolchains:
    """The toolchains of one cache folder; safe to use from several processes."""

    def __init__(self, cache: Path, *, cancel: threading.Event | None = None) -> None:
        self._root = cache / "toolchains"
        self._cancel = cancel or threading.Event()

    def ensure(self, name: str, progress: Progress = lambda *_: None) -> Toolchain:
        """The toolchain of that name, installed if it is not yet.

        Raises:
            ToolchainError: no such lock, or the installation failed; the message has pip's last line.
            Cancelled: while installing.
        """
        lock = lock_text(name)
        lock_hash = hash_of_lock(lock)
        folder = self._root / f"{name}-{lock_hash}"
        marker = folder / "edgefleet-toolchain.json"
        if not marker.exists():
            self._root.mkdir(parents=True, exist_ok=True)
            with _waiting_lock(self._root / f".{folder.name}.lock"):
                if not marker.exists():
                    self._install(name, lock, folder, progress)
                    marker.write_text(json.dumps(self._installed(folder)))
        return Toolchain(name, str(folder / "bin" / "python"), lock_hash, json.loads(marker.read_text()))

    def raise_if_cancelled(self) -> None:
        """Raises Cancelled once the event given to this object is set: for whoever waits between children."""
        if self._cancel.is_set():
            raise Cancelled("cancelled while waiting for another job")

    def run(
        self,
        toolchain: Toolchain,
        module: str,
        request: dict[str, Any],
        work: Path,
        log_file: Path,
        *,
        limit_s: float,
        memory_bytes: int | None = None,
        progress: Progress = lambda *_: None,
    ) -> dict[str, Any]:
        """Run one job in a toolchain's environment.

        Args:
            module: of :mod:`edgefleet_controller.compile.children`.
            work: folder for the request; the child's working folder.
            log_file: receives what the child and its libraries print; outlives the job.
            limit_s: the child is killed after so many seconds.
            memory_bytes: the child is killed when more than this is resident.

        Raises:
            EdgefleetError: what the child refused, as it said it.
            ChildDied: it crashed or outgrew ``memory_bytes``.
            Cancelled: by the event given to this object.
            ToolchainError: it broke or ran past its limit; the message ends with the log's last line.
        """
        work.mkdir(parents=True, exist_ok=True)
        action = request["action"]
        request_file = work / f"{action}.request.json"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        request_file.write_text(json.dumps(request))
        name = f"{toolchain.name} {action}"
        command = [toolchain.python, "-I", "-c", _RUN, str(_FOLDER), module, str(request_file)]
        answers: list[dict[str, Any]] = []

        def line(text: bytes) -> None:
            try:
                message = json.loads(text)
            except ValueError:
                return  # a cut line of a child that died
            if "progress" in message:
                progress(*message["progress"])
            else:
                answers.append(message)

        environment = {k: v for k, v in os.environ.items() if k in _KEPT} | _JOB_ENVIRONMENT
        code = self._watch(command, environment, work, log_file, limit_s, name, line, memory_bytes)
        if code < 0:
            raise ChildDied(name, _signal_name(-code), f"see {log_file}")
        if code != 0 or not answers:
            raise ToolchainError(f"{name} failed: {_last_line(log_file)}", hint=f"see {log_file}")
        if "error" in answers[-1]:
            raise errors.from_dict(answers[-1]["error"])
        result: dict[str, Any] = answers[-1]["result"]
        return result

    def _watch(
        self, command: list[str], environment: dict[str, str], folder: Path, log_file: Path, limit_s: float, name: str,
        line: Callable[[bytes], None], memory_bytes: int | None = None,
    ) -> int:  # fmt: skip
        """Run a command in a session of its own; returns its exit status, negative for a signal."""
        deadline = time.monotonic() + limit_s
        with log_file.open("wb") as log:
            try:
                process = subprocess.Popen(
                    command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as exc:
                raise ToolchainError(
                    f"can't start {command[0]}: {exc.strerror}",
                    hint="remove that toolchain's folder; it is installed anew",
                ) from exc
        assert process.stdout is not None
        pending = b""
        try:
            with selectors.DefaultSelector() as selector:
                os.set_blocking(process.stdout.fileno(), False)
                selector.register(process.stdout, selectors.EVENT_READ)
                while True:
                    if self._cancel.is_set():
                        raise Cancelled(f"{name} was cancelled")
                    if time.monotonic() > deadline:
                        raise ToolchainError(
                            f"{name} ran past its limit of {limit_s:.0f} s and was stopped", hint=f"see {log_file}"
                        )
                    if memory_bytes is not None and _resident_bytes(process.pid) > memory_bytes:
                        how = f"over its memory limit of {memory_bytes} bytes (SIGKILL)"
                        raise ChildDied(name, how, f"see {log_file}")
                    if selector.select(timeout=POLL_S):
                        piece = process.stdout.read(65536)
                        if not piece:
                            break
                        *complete, pending = (pending + piece).split(b"\n")
                        for text in complete:
                            line(text)
            return process.wait(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as exc:
            raise ToolchainError(f"{name} closed its output but did not end", hint=f"see {log_file}") from exc
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()

    def _install(self, name: str, lock: str, folder: Path, progress: Progress) -> None:
        progress(f"installing the {name} toolchain", 0, 1)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        by_hash, _, by_version = lock.partition(BY_VERSION)
        lock_file, versions = folder / "lock.txt", by_version.split()
        lock_file.write_text(by_hash)
        log = folder / "install.log"
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            # A lock is whole, and may leave out what a package asks for and never uses.
            [*pip, "--only-binary", ":all:", "--no-deps", "--require-hashes", "--requirement", str(lock_file)],
            *([[*pip, "--only-binary", ":all:", *versions]] if versions else []),
        ):
            # pip needs what the user set: index, proxy, certificates.
            code = self._watch(
                command, dict(os.environ), folder, log, INSTALL_LIMIT_S, f"installing {name}", lambda _: None
            )
            if code != 0:
                reason = _last_line(log)
                raise ToolchainError(
                    f"can't install the {name} toolchain: {reason}",
                    hint=f"see {log}; needed are a line to the package index, disk space, and Python's venv module",
                )
        progress(f"installing the {name} toolchain", 1, 1)

    def _installed(self, folder: Path) -> dict[str, str]:
        """Name and version of everything in the environment, for the bill of materials."""
        found: dict[str, str] = {}
        for entry in sorted(folder.glob("lib/python*/site-packages/*.dist-info")):
            name, _, version = entry.name.removesuffix(".dist-info").rpartition("-")
            found[name] = version
        return found


def lock_text(name: str) -> str:
    """The lock of a toolchain.

    Raises:
        ToolchainError: this build has none of that name.
    """
    lock = resources.files("edgefleet_controller.compile") / "locks" / f"{name}.txt"
    if not lock.is_file():
        raise ToolchainError(f"no toolchain {name!r} in this build")
    return lock.read_text()


def hash_of_lock(lock: str) -> str:
    """Short hash over the lock, Python's version and the machine: what decides the environment's content."""
    what = f"{lock}\n{sys.version_info[:2]}\n{platform.machine()}"
    return hashlib.sha256(what.encode()).hexdigest()[:12]


@contextmanager
def _waiting_lock(path: Path) -> Iterator[None]:
    """Hold a file lock, waiting for whoever has it: two programs may want one toolchain at one time."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0  # it has just ended
    return pages * os.sysconf("SC_PAGE_SIZE")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
