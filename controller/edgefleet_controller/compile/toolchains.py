"""Stage 2, compile: toolchains. Receives a lock or a target, hands on an environment of its own and runs jobs in it.

Each toolchain lives in an environment (:mod:`.environments`) that is installed on first use from a hashed lock: their pins contradict
each other, so they share none, and none is the controller's. A job is a child process (:mod:`.watching`) with a JSON request, JSON
lines back, a log file, and a time limit; cancelling kills it and all that it started. Source of the arrangement: PEP 517's build
environments.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from edgefleet_shared import atomic, errors
from edgefleet_shared.errors import ToolchainError, ToolchainUnusable
from edgefleet_shared.malformed import MALFORMED

from edgefleet_controller.compile import environments, tools
from edgefleet_controller.compile.environments import Lock, Progress
from edgefleet_controller.compile.port import Target, lock_of
from edgefleet_controller.compile.watching import (
    Cancelled,
    Child,
    died,
    last_line,
    watch,
)

_START = Path(__file__).parent / "children" / "start.py"
_LOCK_POLL_S = 0.1
# onnxruntime, openvino and nncf report usage to their makers unless told not to. Hashes and threads are fixed so that the
# same inputs give the same bytes.
_JOB_ENVIRONMENT = {
    "ORT_DISABLE_TELEMETRY": "1", "NNCF_CI": "1", "DO_NOT_TRACK": "1",
    "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH")


class Toolchain(msgspec.Struct, frozen=True):
    """An installed environment with the packages of its lock, and the vendor's programs that are used beside it. ``lock_hash`` stands for
    every version in both and is part of a compile's cache key."""

    name: str
    python: str
    lock_hash: str
    packages: dict[str, str]
    tools: dict[str, str] = {}
    variables: dict[str, str] = {}  # of the environment, that those programs want


class _Line(msgspec.Struct):
    """What a child may say, one at a time (see :mod:`.children.job`)."""

    progress: tuple[str, int, int] | None = None
    result: dict[str, Any] | None = None
    error: dict[str, str] | None = None


class Toolchains:
    """The toolchains of one cache folder; safe to use from several processes."""

    def __init__(self, cache: Path, *, cancel: threading.Event | None = None) -> None:
        self.root = cache / "toolchains"
        self._cancel = cancel or threading.Event()

    def for_target(self, target: Target, precision: str, progress: Progress = lambda *_: None) -> Toolchain:
        """What a target compiles a precision with: its environment, installed if it is not yet, and the vendor's programs.

        Raises:
            ToolchainUnusable: as :meth:`ensure`, or a program that is missing or of a version that the target does not know.
        """
        found = tools.find_all(target.tools, precision)  # before anything is installed for nothing
        toolchain = self.ensure(lock_of(target), progress)
        if not found:
            return toolchain
        told = hashlib.sha256(json.dumps([(f.name, f.version, f.content) for f in found]).encode()).hexdigest()[:12]
        return msgspec.structs.replace(
            toolchain,
            lock_hash=f"{toolchain.lock_hash}-{told}",
            tools={f.name: f.version for f in found},
            variables={name: value for f in found for name, value in f.variables.items()},
        )

    def ensure(self, wanted: str | Lock, progress: Progress = lambda *_: None, *, again: bool = False) -> Toolchain:
        """The environment of a lock (of this build, by name, or any), installed if it is not yet.

        Args:
            again: install it even if it is there.

        Raises:
            ToolchainUnusable: no such lock, a broken environment, or the installation failed; the message has pip's reason.
            EnvironmentProblem: the disk is full, or the cache can't be written.
            Cancelled: while installing, or while waiting for another program that does.
        """
        lock = environments.lock_named(wanted) if isinstance(wanted, str) else wanted
        folder = environments.folder_of(self.root, lock)
        marker = folder / environments.MARKER
        if again or not marker.exists():
            with atomic.disk_errors(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
            with self._waiting_lock(self.root / f".{folder.name}.lock", lock, progress):
                if again or not marker.exists():
                    environments.install(self.root, lock, self._cancel, progress)
        return Toolchain(lock.name, str(folder / "bin" / "python"), lock.hash, lock.of(environments.whole(folder)))

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
            module: of :mod:`edgefleet_controller.compile.children`, or the path of a file with a function ``main``.
            work: folder for the request; the child's working folder.
            log_file: gets, at its end, what the child and its libraries print; outlives the job.
            limit_s: the child is killed after so many seconds.
            memory_bytes: the child is killed when more than this is resident, of it and what it started.

        Raises:
            EdgefleetError: what the child refused, as it said it.
            ChildDied: it crashed or outgrew ``memory_bytes``. ChildKilled: this machine ended it, for want of memory or of an instruction.
            Cancelled: by the event given to this object.
            ToolchainError: it broke, answered rubbish, or ran past its limit; the message ends with the log's last line.
        """
        work.mkdir(parents=True, exist_ok=True)
        request_file = work / f"{request['action']}.request.json"
        request_file.write_text(json.dumps(request))
        name = f"{toolchain.name} {request['action']}"
        answers: list[_Line] = []

        def line(text: bytes) -> None:
            try:
                message = msgspec.json.decode(text, type=_Line, strict=False)
            except MALFORMED as exc:
                said = text[:200].decode(errors="replace")
                raise ToolchainError(f"{name} answered what is no answer: {said!r}", hint=f"see {log_file}") from exc
            if message.progress is not None:
                progress(*message.progress)
            else:
                answers.append(message)

        child = Child(
            name=name,
            command=[toolchain.python, "-s", str(_START), module, str(request_file)],
            environment={k: v for k, v in os.environ.items() if k in _KEPT}
            | _JOB_ENVIRONMENT
            # What it and its libraries put aside goes with the job's folder, also where it was killed over it.
            | {"TMPDIR": str(work.resolve())}
            # Not as they are: a vendor's PYTHONPATH would lead the toolchain's own Python astray.
            | {"EDGEFLEET_VENDORS_VARIABLES": json.dumps(toolchain.variables)},
            folder=work,
            log=log_file,
            limit_s=limit_s,
            memory_bytes=memory_bytes,
        )
        code = watch(child, line, self._cancel)
        if code < 0:
            raise died(name, -code, f"see {log_file}")
        if code != 0 or not answers:
            raise self._failure(name, toolchain, log_file)
        last = answers[-1]
        if last.error is not None:
            raise errors.from_dict(last.error)
        return last.result or {}

    def _failure(self, name: str, toolchain: Toolchain, log_file: Path) -> ToolchainError:
        """A child that broke: because its environment did, if that is so."""
        said = last_line(log_file)
        if said.startswith(("ModuleNotFoundError", "ImportError")):
            said += "; its environment seems damaged"
            return ToolchainUnusable(
                f"{name} failed: {said}", hint=f"fleet toolchain check {toolchain.name}; see {log_file}"
            )
        return ToolchainError(f"{name} failed: {said}", hint=f"see {log_file}")

    @contextmanager
    def _waiting_lock(self, path: Path, lock: Lock, progress: Progress) -> Iterator[None]:
        """Hold a file lock, waiting for whoever has it: two programs may want one toolchain at one time."""
        with atomic.disk_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    progress(f"waiting for another program that installs the {lock.name} toolchain", 0, 1)
                    if self._cancel.wait(_LOCK_POLL_S):
                        raise Cancelled(
                            f"cancelled while another program installed the {lock.name} toolchain"
                        ) from None
            yield
        finally:
            os.close(fd)
