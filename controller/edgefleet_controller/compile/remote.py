"""Stage 2, compile: a worker on a machine of its own. Receives tasks over HTTPS, hands on artifacts and their reports, blob by blob.

It has a layout and a cache of its own and runs the same process (:mod:`.worker`) as the controller's own workers do, so that the same inputs
and toolchains give the same digest. ``fleet worker run`` runs it; a controller that starts again does not disturb it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
from edgefleet_shared import atomic, enrolling
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import EnvironmentProblem, InputError, NotFoundError, QualityError
from edgefleet_shared.work import POLL_S, Answer, CompileTask, Progress, Task
from edgefleet_shared.work_client import WorkClient
from edgefleet_shared.work_loop import Held, run_until_signalled

from edgefleet_controller.compile.attempt import Attempt
from edgefleet_controller.compile.cache_limit import IN_USE_S
from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.compile.watching import Cancelled
from edgefleet_controller.compile.worker import JobRequest

log = logging.getLogger(__name__)

_OWNER = "fleet worker run"


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who this worker is, where its controller is, and by which token it was enrolled; "" when that was not noted yet."""

    name: str
    host: str
    port: int
    token_sha256: str = ""


def is_of(folder: Path, token: str) -> bool:
    """Whether the worker in ``folder`` was enrolled by this token, which a service gives at each start. Another one enrols it anew."""
    if not (folder / "worker.json").exists():
        return False
    return _enrolled(folder).token_sha256 in ("", _sha256(token))


def _enrolled(folder: Path) -> Identity:
    return msgspec.json.decode((folder / "worker.json").read_bytes(), type=Identity)


def _sha256(token: str) -> str:
    return hashlib.sha256(token.strip().encode()).hexdigest()


def enrol(folder: Path, url: str, token: str) -> Identity:
    """Ask for a certificate and keep it. A worker that is there already, but was revoked, is enrolled again under its name.

    Args:
        folder: the worker's own; ``identity/`` in it is made.

    Raises:
        ConflictError: it runs. EdgefleetError: as :func:`edgefleet_shared.enrolling.ask`.
    """
    with atomic.lock(folder, _OWNER):
        name = _enrolled(folder).name if (folder / "worker.json").exists() else ""
        return _enrol(folder, url, token, name)


def _enrol(folder: Path, url: str, token: str, name: str) -> Identity:
    identity = folder / "identity"
    atomic.make_folder(identity, 0o700)
    key = enrolling.kept_key(identity / "worker.key")
    enrolled, ca = enrolling.ask(url, token, name, lambda: key)
    if enrolled.device_class:
        raise InputError(
            f"the token is for a builder board of {enrolled.device_class}",
            hint="a board measures by: fleet-agent measure",
        )
    host, port = enrolling.address(url)
    atomic.write(identity / "worker.pem", enrolled.certificate.encode())
    atomic.write(identity / "ca.pem", ca.encode())
    made = Identity(name=enrolled.device, host=host, port=port, token_sha256=_sha256(token))
    # Last: this file says that the rest is there.
    atomic.write(folder / "worker.json", msgspec.json.encode(made))
    return made


def run(folder: Path, cache: Path, cache_limit_bytes: int, *, workers: int) -> None:
    """Work until SIGTERM or SIGINT.

    Raises:
        NotFoundError: nobody is enrolled in ``folder``. TrustError: the certificate can't be used, or the controller knows it no more.
    """
    if not (folder / "worker.json").exists():
        raise NotFoundError(f"no worker is enrolled in {folder}", hint="give a token from: fleet worker token")
    who, identity = _enrolled(folder), folder / "identity"
    ca, certificate = identity / "ca.pem", identity / "worker.pem"
    client = WorkClient(who.host, who.port, ca=ca, certificate=certificate, key=identity / "worker.key")
    worker = RemoteWorker(client, Layout(folder / "blobs"), cache, cache_limit_bytes)
    log.info("worker enrolled", extra={"worker": who.name, "controller": f"{who.host}:{who.port}"})
    with atomic.lock(folder, _OWNER):
        run_until_signalled(
            client, worker.carry_out, at_once=workers, end=worker.cancel,
            renew=lambda: enrolling.renew(who.host, who.port, client.tls, atomic.read(certificate), atomic.read(ca)),
        )  # fmt: skip


class Made(NamedTuple):
    """What an attempt came to."""

    result: CompileResult
    blobs: tuple[str, ...]


class RemoteWorker:
    """Does tasks, several at once. Blobs are kept for the next ones, until none used them for a day."""

    def __init__(self, client: WorkClient, layout: Layout, cache: Path, cache_limit_bytes: int) -> None:
        self._client, self._layout = client, layout
        self._cache, self._cache_limit_bytes = cache, cache_limit_bytes
        self._attempts: set[Attempt] = set()
        self._lock = threading.Lock()
        self._ending = False
        self._tasks = 0

    def cancel(self) -> None:
        """End what is under way, and begin nothing more; their leases end, and others get the jobs."""
        with self._lock:
            self._ending = True
            for attempt in self._attempts:
                attempt.cancel()

    def carry_out(self, task: Task, held: Held) -> None:
        """Do one task and hand in its result.

        Raises:
            EdgefleetError: what it failed by.
        """
        if not isinstance(task, CompileTask):
            raise InputError("this worker compiles; it measures nothing")
        with self._under_way():
            self._do(task, held)

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
        with self._lock:
            if not self._tasks:
                self._forget_unused()
            self._tasks += 1
        try:
            yield
        finally:
            with self._lock:
                self._tasks -= 1

    def _forget_unused(self) -> None:
        """The blobs that no task used for a day. Only while none is under way: what it makes may be one of them."""
        with contextlib.suppress(OSError, EnvironmentProblem):  # the next task tries again
            for path in (*map(self._layout.path, self._layout.digests()), *self._layout.unfinished()):
                if time.time() - path.stat().st_mtime > IN_USE_S:
                    path.unlink()

    def _do(self, task: CompileTask, held: Held) -> None:
        for digest in task.blobs:
            held.persistently(partial(self._client.fetch, held.lease, digest, self._layout))
            os.utime(self._layout.path(digest))
        try:
            made = self._attempt(task, held)
        except QualityError as exc:  # its report is what is left of the work
            for digest in exc.reports:
                held.persistently(partial(self._client.upload, held.lease, digest, self._layout))
            raise
        held.step = Progress("uploading", 0, 1)
        for digest in made.blobs:
            held.persistently(partial(self._client.upload, held.lease, digest, self._layout))
        held.persistently(lambda: self._client.finish(held.lease, made.result))

    def _attempt(self, task: CompileTask, held: Held) -> Made:
        request = JobRequest(
            layout=str(self._layout.root.resolve()), cache=str(self._cache), cache_limit_bytes=self._cache_limit_bytes,
            version=task.version, device_class=task.device_class, ship_despite_quality=task.ship_despite_quality, builder=task.builder,
        )  # fmt: skip
        with Attempt(request) as attempt:
            held.on_end = attempt.cancel
            with self._lock:
                self._attempts.add(attempt)
            try:
                if held.ended.is_set() or self._ending:
                    raise Cancelled("cancelled before it began")
                result = attempt.run(_Listener(self._client, self._layout, held))
            finally:
                with self._lock:
                    self._attempts.discard(attempt)
        return Made(result, (*_blobs(self._layout, result.artifact.digest), result.report, result.page))


class _Listener:
    """What a worker does with its process's words: the lease's next renewal tells the progress."""

    def __init__(self, client: WorkClient, layout: Layout, held: Held) -> None:
        self._client, self._layout, self._held = client, layout, held

    def progress(self, step: Progress) -> None:
        self._held.step = step

    def log(self, text: str) -> None:
        self._held.persistently(lambda: self._client.log(self._held.lease, text))

    def measure(self, manifest: str) -> Answer:
        held, client = self._held, self._client
        for digest in _blobs(self._layout, manifest):
            held.persistently(partial(client.upload, held.lease, digest, self._layout))
        job = held.persistently(lambda: client.wish(held.lease, manifest))
        while job:
            answer = held.persistently(lambda: client.answer(held.lease, job))
            if answer.state != "waiting":
                return answer
            if held.ended.wait(POLL_S):
                raise Cancelled("cancelled while a board measured")
        return Answer(state="unmeasured")


def _blobs(layout: Layout, manifest: str) -> tuple[str, ...]:
    """An artifact's blobs, the manifest last: what names others comes after them."""
    return (*(blob.digest for blob in layout.manifest(manifest).blobs()), manifest)
