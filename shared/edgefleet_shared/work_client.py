"""Stage 2, compile: a worker's end of the work protocol. Receives an identity, hands on tasks, blobs and answers.

Standard library only: a builder board uses it too. Each call is a connection of its own, so that nothing is left half-open by a cut line.
Messages are in :mod:`edgefleet_shared.work`.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import random
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgefleet_shared import atomic, work
from edgefleet_shared.artifact import CHUNK_BYTES, Layout
from edgefleet_shared.errors import ArtifactError, ConflictError, EdgefleetError, TransportError, TrustError, from_dict

log = logging.getLogger(__name__)

T = TypeVar("T")
TIMEOUT_S = 60.0
RETRY_S = 5.0
MAX_ERROR_BYTES = 1024 * 1024
_TASK: msgspec.json.Decoder[work.Task | None] = msgspec.json.Decoder(work.CompileTask | work.MeasureTask | None)


class WorkClient:
    """Calls one controller by one worker's certificate.

    Args:
        ca, certificate, key: PEM files.

    Raises:
        TrustError: they can't be used.
    """

    def __init__(self, host: str, port: int, *, ca: Path, certificate: Path, key: Path) -> None:
        self._host, self._port = host, port
        try:
            self._tls = ssl.create_default_context(cafile=str(ca))
            self._tls.load_cert_chain(str(certificate), str(key))
        except OSError as exc:  # ssl.SSLError is one
            raise TrustError("identity", f"this worker's certificate can't be used: {exc}") from exc

    def claim(self) -> work.Task | None:
        """The next task, leased; None where there is nothing to do."""
        return _decoded(self._call("POST", "/v1/work/claim"), _TASK)

    def progress(self, lease: str, step: work.Progress) -> bool:
        """Renew the lease; whether to go on.

        Raises:
            ConflictError: the lease has ended: the job is another's by now.
        """
        return self._ask(f"/v1/work/{lease}/progress", step, work.Going).go_on

    def wish(self, lease: str, manifest: str) -> str:
        """Have an artifact measured; the id to ask by, empty where there is nobody to do it."""
        return self._ask(f"/v1/work/{lease}/wishes", work.Wish(manifest), work.Wished).job

    def answer(self, lease: str, job: str) -> work.Answer:
        """What became of a wish."""
        return _decoded(self._call("GET", f"/v1/work/{lease}/wishes/{job}"), msgspec.json.Decoder(work.Answer))

    def finish(self, lease: str, result: msgspec.Struct) -> None:
        """Hand in the result; its blobs were uploaded before.

        Raises:
            EdgefleetError: it was refused, and why.
        """
        self._call("POST", f"/v1/work/{lease}/result", msgspec.json.encode(result))

    def fail(self, lease: str, error: dict[str, str]) -> None:
        """Say that it failed."""
        self._call("POST", f"/v1/work/{lease}/failure", msgspec.json.encode(work.Failure(error)))

    def fetch(self, lease: str, digest: str, layout: Layout) -> None:
        """Fetch a blob of the task, unless it is here.

        Raises:
            ArtifactError: the bytes are not the digest's; nothing is kept.
        """
        if layout.has(digest):
            return
        target = layout.path(digest)
        staged = target.with_name(f".fetch-{os.getpid()}-{target.name}")
        link = self._open("GET", f"/v1/work/{lease}/blobs/{digest}")
        try:
            state, answer = hashlib.sha256(), self._answered(link)
            with atomic.disk_errors(staged), staged.open("wb") as file:
                while piece := _piece(answer):
                    state.update(piece)
                    file.write(piece)
            if "sha256:" + state.hexdigest() != digest:
                raise ArtifactError(f"what came for {digest} hashes to sha256:{state.hexdigest()}")
            atomic.adopt(staged, target)
        finally:
            link.close()
            staged.unlink(missing_ok=True)

    def upload(self, lease: str, digest: str, layout: Layout) -> None:
        """Send a blob of the result, unless the controller has it."""
        path = layout.path(digest)
        known = self._call("GET", f"/v1/work/{lease}/uploads/{digest}")
        if msgspec.json.decode(known, type=bool):
            return
        with path.open("rb") as file:
            self._call("PUT", f"/v1/work/{lease}/uploads/{digest}", file, path.stat().st_size)

    def _ask(self, path: str, message: msgspec.Struct, kind: type[T]) -> T:
        return _decoded(self._call("POST", path, msgspec.json.encode(message)), msgspec.json.Decoder(kind))

    def _call(self, method: str, path: str, body: Any = b"", size: int | None = None) -> bytes:
        link = self._open(method, path, body, size)
        try:
            answer, pieces = self._answered(link), list[bytes]()
            while piece := _piece(answer):
                pieces.append(piece)
            return b"".join(pieces)
        finally:
            link.close()

    def _open(self, method: str, path: str, body: Any = b"", size: int | None = None) -> http.client.HTTPSConnection:
        link = http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT_S, context=self._tls)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body) if size is None else size)}
        try:
            link.request(method, path, body=body or None, headers=headers)
        except (OSError, http.client.HTTPException) as exc:
            link.close()
            raise self._unreachable(exc) from exc
        return link

    def _answered(self, link: http.client.HTTPSConnection) -> http.client.HTTPResponse:
        """The answer, if it is a good one; else the controller's own words."""
        try:
            answer = link.getresponse()
            if answer.status == 200:
                return answer
            content = answer.read(MAX_ERROR_BYTES)
        except (OSError, http.client.HTTPException) as exc:
            raise self._unreachable(exc) from exc
        try:
            raise from_dict(msgspec.json.decode(content, type=dict[str, str]))
        except msgspec.DecodeError as exc:
            raise TransportError(f"the controller answered {answer.status}") from exc

    def _unreachable(self, exc: Exception) -> TransportError:
        return TransportError(f"can't reach the controller at {self._host}:{self._port}: {exc}")


def _piece(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as exc:
        raise TransportError(f"the line to the controller broke: {exc}") from exc


def _decoded(content: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(content)
    except msgspec.DecodeError as exc:
        raise TransportError(f"the controller's answer can't be read: {exc}") from exc


class Held:
    """A lease that is renewed, in a thread of its own, for as long as the ``with`` block lasts.

    Args:
        on_end: called once, when the job is no longer wanted or the lease has ended: whoever works on it should stop.
    """

    def __init__(
        self, client: WorkClient, lease: str, lease_s: float, on_end: Callable[[], None] = lambda: None
    ) -> None:
        self._client, self.lease, self._lease_s, self.on_end = client, lease, lease_s, on_end
        self.step = work.Progress("begun", 0, 1)
        self.ended = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Held:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def persistently(self, call: Callable[[], T]) -> T:
        """Call until the controller can be reached: it may be starting again, and the lease outlives that.

        Raises:
            ConflictError: the lease ended first. EdgefleetError: what the controller answered.
        """
        while True:
            try:
                return call()
            except TransportError as exc:
                log.warning("controller out of reach", extra={"reason": str(exc)})
                if self.ended.wait(work.POLL_S):
                    raise ConflictError("the lease has ended") from exc

    def _renew(self) -> None:
        heard = time.monotonic()
        while not self._done.wait(self._lease_s / work.RENEWALS):
            try:
                wanted = self._client.progress(self.lease, self.step)
                heard = time.monotonic()
            except TransportError:
                wanted = time.monotonic() - heard < self._lease_s
            except EdgefleetError as exc:
                log.warning("lease ended", extra={"reason": str(exc)})
                wanted = False
            if not wanted:
                self.ended.set()
                self.on_end()
                return


def work_until(stopping: threading.Event, client: WorkClient, carry_out: Callable[[work.Task, Held], None]) -> None:
    """Claim one task after the other until told to stop; what goes wrong with one is told to the controller and ends nothing else.

    Args:
        carry_out: does a task and hands in its result; raises what it failed by.
    """
    while not stopping.is_set():
        try:
            task = client.claim()
        except TransportError as exc:
            log.warning("controller out of reach", extra={"reason": str(exc)})
            stopping.wait(RETRY_S * random.uniform(0.5, 1.5))  # noqa: S311 - jitter: not all at once when it is back
            continue
        if task is None:
            stopping.wait(work.POLL_S)
            continue
        log.info("job begun", extra={"job": task.job})
        with Held(client, task.lease, task.lease_s) as held:
            try:
                carry_out(task, held)
                log.info("job done", extra={"job": task.job})
            except EdgefleetError as exc:
                log.warning("job failed", extra={"job": task.job, "code": exc.code, "reason": str(exc)})
                if not (held.ended.is_set() or stopping.is_set()):
                    _tell(held, client, exc)


def _tell(held: Held, client: WorkClient, error: EdgefleetError) -> None:
    try:
        held.persistently(lambda: client.fail(held.lease, error.as_dict()))
    except EdgefleetError as exc:  # it was refused, or is another's by now
        log.warning("failure not taken", extra={"reason": str(exc)})
