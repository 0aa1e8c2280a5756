"""Stage 2, compile: a worker's end of the work protocol. Receives an identity, hands on tasks, blobs and answers.

Standard library only: a builder board uses it too. Each call is a connection of its own, so that nothing is left half-open by a cut line.
Messages are in :mod:`edgefleet_shared.work`.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
from contextlib import suppress
from email.utils import parsedate_to_datetime  # http.client has loaded it
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgefleet_shared import __version__, atomic, work
from edgefleet_shared.artifact import CHUNK_BYTES, Layout, digest_file
from edgefleet_shared.certificates import is_due, mind_clock, validity
from edgefleet_shared.errors import (
    ArtifactError,
    EnvironmentProblem,
    TransportError,
    TrustError,
    from_dict,
)
from edgefleet_shared.malformed import MALFORMED

T = TypeVar("T")
TIMEOUT_S = 60.0
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
        self._ca, self._certificate, self._key = ca, certificate, key
        self._controllers_clock = 0.0  # when it answered last, seconds since 1970
        self._load()

    def _load(self) -> None:
        try:
            tls = ssl.create_default_context(cafile=str(self._ca))
            tls.load_cert_chain(str(self._certificate), str(self._key))
            self._begins, _ = validity(self._certificate)
        except (OSError, EnvironmentProblem) as exc:  # ssl.SSLError is an OSError
            raise TrustError("identity", f"this worker's certificate can't be used: {exc}") from exc
        mind_clock(tls, self._begins)
        self.tls = tls

    def renewal_is_due(self, now: float) -> bool:
        """Whether the certificate should be renewed (``now``: seconds since 1970, by a clock that may stand in the past: a builder board may
        have none, so that the controller's counts too).

        Raises:
            EnvironmentProblem: it can't be read.
        """
        return is_due(self._certificate, max(now, self._controllers_clock))

    def adopt(self, certificate: str) -> None:
        """Keep another certificate (PEM) for the same key; calls that begin from now on show it.

        Raises:
            EnvironmentProblem: the disk refused. TrustError: it can't be used.
        """
        atomic.write(self._certificate, certificate.encode())
        self._load()

    def claim(self) -> work.Task | None:
        """The next task, leased; None where there is nothing to do."""
        return _decoded(self._call("POST", "/v1/work/claim"), _TASK)

    def progress(self, lease: str, step: work.Progress) -> bool:
        """Renew the lease; whether to go on.

        Raises:
            ConflictError: the lease has ended: the job is another's by now.
        """
        return self._ask(f"/v1/work/{lease}/progress", step, work.Going).go_on

    def log(self, lease: str, text: str) -> None:
        """What the job's toolchains printed."""
        self._call("POST", f"/v1/work/{lease}/log", msgspec.json.encode(work.Log(text)))

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

    def give_back(self, lease: str) -> None:
        """Let the next worker have the job."""
        self._call("DELETE", f"/v1/work/{lease}")

    def fail(self, lease: str, error: dict[str, str]) -> None:
        """Say that it failed."""
        self._call("POST", f"/v1/work/{lease}/failure", msgspec.json.encode(work.Failure(error)))

    def fetch(self, lease: str, digest: str, layout: Layout) -> None:
        """Fetch a blob of the task, unless it is here, whole.

        Raises:
            ArtifactError: the bytes are not the digest's; nothing is kept.
        """
        if layout.has(digest) and digest_file(layout.path(digest), files=layout.files) == digest:
            return
        target, files = layout.path(digest), layout.files
        staged = target.with_name(f".fetch-{os.getpid()}-{target.name}")
        link = self._open("GET", f"/v1/work/{lease}/blobs/{digest}")
        try:
            state, size, answer = hashlib.sha256(), 0, self._answered(link)
            atomic.write_piece(staged, b"", 0, files=files)  # an empty blob is a file, too
            while piece := _piece(answer):
                atomic.write_piece(staged, piece, size, files=files)
                state.update(piece)
                size += len(piece)
            if "sha256:" + state.hexdigest() != digest:
                raise ArtifactError(f"what came for {digest} hashes to sha256:{state.hexdigest()}")
            atomic.adopt(staged, target, files=files)
        finally:
            link.close()
            with suppress(FileNotFoundError):
                files.unlink(staged)

    def upload(self, lease: str, digest: str, layout: Layout) -> None:
        """Send a blob of the result, unless the controller has it."""
        path = layout.path(digest)
        known = self._call("GET", f"/v1/work/{lease}/uploads/{digest}")
        if msgspec.json.decode(known, type=bool):
            return
        pieces = atomic.pieces(path, files=layout.files)
        self._call("PUT", f"/v1/work/{lease}/uploads/{digest}", pieces, path.stat().st_size)

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
        mind_clock(self.tls, self._begins)  # somebody may have told the time meanwhile
        link = http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT_S, context=self.tls)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body) if size is None else size),
            "User-Agent": f"{work.AGENT}/{__version__}",
        }
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
            self._hear_time(answer.headers.get("Date", ""))
            if answer.status == 200:
                return answer
            content = answer.read(MAX_ERROR_BYTES)
        except (OSError, http.client.HTTPException) as exc:
            raise self._unreachable(exc) from exc
        try:
            raise from_dict(msgspec.json.decode(content, type=dict[str, str]))
        except MALFORMED as exc:
            raise TransportError(f"the controller answered {answer.status}") from exc

    def _hear_time(self, date: str) -> None:
        with suppress(ValueError, OverflowError):
            self._controllers_clock = parsedate_to_datetime(date).timestamp()

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
    except MALFORMED as exc:
        raise TransportError(f"the controller's answer can't be read: {exc}") from exc
