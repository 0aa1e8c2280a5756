"""The work protocol over HTTPS: a face, no logic. Receives workers' requests, hands them to the leases (:mod:`edgefleet_controller.compile.leases`).

Who may: workers alone, by the certificate of their enrolment, which is looked up by name and serial number at every call, so that a revoked
one ends at once. A worker reads the blobs of the task that it holds, and writes blobs while it holds one. Messages:
:mod:`edgefleet_shared.work`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from edgefleet_shared import work
from edgefleet_shared.contract import AcceptanceReport
from edgefleet_shared.errors import InputError, NotFoundError, from_dict
from edgefleet_shared.malformed import MALFORMED
from edgefleet_shared.work import IDENTITY_PREFIX, Failure, Going, Log, Progress, Wish, Wished
from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, Response

from edgefleet_controller.api import blobs
from edgefleet_controller.compile.leases import Claimant
from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.controller import Controller
from edgefleet_controller.store import workers

SEEN_EVERY_S = 30.0  # a worker asks for work every other second; that it did is noted less often
T = TypeVar("T")


def routes(controller: Controller) -> APIRouter:
    """The paths below ``/v1/work``."""
    router = APIRouter(prefix="/v1/work")
    leases = controller.compiling.leases

    def worker(request: Request) -> Claimant:
        shown = request.scope.get("extensions", {}).get("edgefleet.client", {})
        name, now = str(shown.get("name", "")), controller.clock.now()
        own = name.removeprefix(IDENTITY_PREFIX) if name.startswith(IDENTITY_PREFIX) else ""
        with controller.database.read() as session:
            row = workers.check(session, own, str(shown.get("serial", "")))
        edgefleet = told_version(request)
        if now - row.last_seen > SEEN_EVERY_S or row.edgefleet != edgefleet:
            with controller.database.write() as session:
                workers.seen(session, own, edgefleet, now)
        return Claimant(row.name, row.device_class or "", edgefleet)

    async def body(request: Request) -> bytes:
        return await request.body()

    by_worker, content = Depends(worker), Depends(body)

    @router.post("/claim")
    def claim(claimant: Claimant = by_worker) -> Response:
        return _json(leases.claim(claimant))

    @router.post("/{lease}/progress")
    def progress(lease: str, claimant: Claimant = by_worker, told: bytes = content) -> Response:
        return _json(Going(leases.renew(lease, claimant, _decoded(told, Progress))))

    @router.post("/{lease}/log")
    def log(lease: str, claimant: Claimant = by_worker, told: bytes = content) -> Response:
        leases.log(lease, claimant, _decoded(told, Log).text)
        return _json(None)

    @router.get("/{lease}/blobs/{digest}")
    def get_blob(lease: str, digest: str, claimant: Claimant = by_worker) -> FileResponse:
        if digest not in leases.blobs(lease, claimant):
            raise NotFoundError(f"no blob {digest} in this task")
        return FileResponse(controller.layout.path(digest), media_type="application/octet-stream")

    @router.get("/{lease}/uploads/{digest}")
    def has_blob(lease: str, digest: str, claimant: Claimant = by_worker) -> Response:
        leases.holds(lease, claimant)
        return _json(controller.layout.has(digest))

    def uploader(lease: str, claimant: Claimant = by_worker) -> None:
        leases.holds(lease, claimant)

    @router.put("/{lease}/uploads/{digest}", dependencies=[Depends(uploader)])
    async def put_blob(lease: str, digest: str, request: Request) -> dict[str, Any]:
        limit = controller.settings.max_blob_bytes
        return {"size": await blobs.receive(request.stream(), digest, controller.layout, limit)}

    @router.post("/{lease}/wishes")
    def wish(lease: str, claimant: Claimant = by_worker, told: bytes = content) -> Response:
        return _json(Wished(leases.wish(lease, claimant, _decoded(told, Wish).manifest)))

    @router.get("/{lease}/wishes/{job}")
    def answer(lease: str, job: str, claimant: Claimant = by_worker) -> Response:
        return _json(leases.answer(lease, claimant, job))

    @router.post("/{lease}/result")
    def result(lease: str, claimant: Claimant = by_worker, told: bytes = content) -> Response:
        if claimant.device_class:
            leases.measured(lease, claimant, _decoded(told, AcceptanceReport))
        else:
            leases.finish(lease, claimant, _decoded(told, CompileResult))
        return _json(None)

    @router.delete("/{lease}")
    def give_back(lease: str, claimant: Claimant = by_worker) -> Response:
        leases.give_back(lease, claimant)
        return _json(None)

    @router.post("/{lease}/failure")
    def failure(lease: str, claimant: Claimant = by_worker, told: bytes = content) -> Response:
        leases.fail(lease, claimant, from_dict(_decoded(told, Failure).error))
        return _json(None)

    return router


def told_version(request: Request) -> str:
    """The version of edgefleet that a caller says it runs; empty when it does not say."""
    kind, _, version = request.headers.get("user-agent", "").partition("/")
    return version[:40] if kind == work.AGENT else ""


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _decoded(content: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except MALFORMED as exc:
        raise InputError(f"not a {kind.__name__}: {exc}") from exc
