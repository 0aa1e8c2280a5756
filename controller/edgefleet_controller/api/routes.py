"""The HTTP API: a face, no logic. Receives requests, hands them to the parts of the controller, turns errors into statuses.

Who may what: operators (``Authorization: Bearer``) everything; boards, by the certificate of their enrolment, the blobs of what
they are assigned, the metadata, and that certificate anew; workers, by theirs, what is below ``/v1/work`` (:mod:`.work`); strangers the CA certificate and, with a one-time token, an enrolment.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from contextlib import suppress
from typing import Any, Literal

import msgspec
from edgefleet_shared import errors
from edgefleet_shared.assignment import AGENT
from edgefleet_shared.errors import ConflictError, EdgefleetError, InputError, NotFoundError, TrustError
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import Scope

from edgefleet_controller import __version__, agent_catalog, model_version
from edgefleet_controller.api import blobs, views, work
from edgefleet_controller.api.wire import Wire
from edgefleet_controller.controller import Controller
from edgefleet_controller.manifests import DeviceClass, Rollout
from edgefleet_controller.manifests.files import parse_value
from edgefleet_controller.rollout.views import IntentKind
from edgefleet_controller.store import catalog, devices, jobs, rollouts, workers

MAX_VERSION_BYTES = 16 * 1024 * 1024
MAX_TOKEN_LIFE_S = 30 * 24 * 3600.0
_STATUS: dict[type[EdgefleetError], int] = {
    InputError: 422,
    NotFoundError: 404,
    ConflictError: 409,
    TrustError: 403,
    errors.ArtifactError: 422,
    errors.QualityError: 422,
    errors.EnvironmentProblem: 503,
    errors.TransportError: 503,
}


class TokenWish(BaseModel):
    role: Literal["device", "worker"] = "device"
    device_class: str
    site: str = ""
    device: str = ""
    ttl_s: float = Field(default=3600.0, gt=0, le=MAX_TOKEN_LIFE_S)


class EnrolWish(BaseModel):
    token: str
    device: str = ""
    request: str


class VersionWish(BaseModel):
    digest: str


class AgentWish(BaseModel):
    manifests: list[str] = Field(min_length=1)


class CompileWish(BaseModel):
    device_class: str
    ship_despite_quality: bool = False


class RolloutWish(BaseModel):
    manifest: dict[str, Any]


def _shown(request: Request) -> bytes:
    """The certificate (DER) that a client showed over TLS; empty when it showed none."""
    return bytes(request.scope.get("extensions", {}).get("edgefleet.client", {}).get("certificate", b""))


def build_api(controller: Controller) -> FastAPI:
    """The application."""
    api = FastAPI(title="edgefleet", version=__version__, docs_url=None, redoc_url=None)

    @api.exception_handler(EdgefleetError)
    async def _failed(request: Request, exc: EdgefleetError) -> JSONResponse:
        status = next((_STATUS[kind] for kind in type(exc).__mro__ if kind in _STATUS), 500)
        return JSONResponse(exc.as_dict(), status)

    @api.exception_handler(RequestValidationError)
    async def _malformed(request: Request, exc: RequestValidationError) -> JSONResponse:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
        return JSONResponse(InputError(f"the request is malformed: {told}").as_dict(), 422)

    @api.exception_handler(HTTPException)
    async def _unknown(request: Request, exc: HTTPException) -> JSONResponse:
        kind = NotFoundError if exc.status_code == 404 else InputError
        return JSONResponse(kind(f"{request.method} {request.url.path}: {exc.detail}").as_dict(), exc.status_code)

    def count(size: int) -> None:
        controller.http_sent_bytes += size

    def streamed(scope: Scope) -> bool:
        return bool(scope["method"] == "PUT" and scope["path"].startswith(("/v1/blobs/", "/v1/work/")))

    api.add_middleware(Wire, count=count, streamed=streamed)

    def operator(request: Request) -> str:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        shown = hashlib.sha256(token.encode()).hexdigest()
        if kind.lower() != "bearer" or not hmac.compare_digest(shown, controller.settings.operator_sha256):
            raise TrustError("operator", "the operator's token is missing or wrong", hint="see operator.yaml")
        return "operator"

    def reader(request: Request, digest: str = "") -> str:
        """An operator, or a board that may have what it asks for."""
        if shown := _shown(request):
            with suppress(TrustError, NotFoundError):
                device = controller.enrolment.holder(shown)
                if not digest or controller.may_have(device, digest):
                    return device
        return operator(request)

    by_operator, by_reader = [Depends(operator)], [Depends(reader)]

    @api.get("/v1/ca")
    def ca() -> PlainTextResponse:
        return PlainTextResponse(controller.ca.pem.decode())

    @api.post("/v1/enroll")
    def enroll(wish: EnrolWish, request: Request) -> Any:
        version = work.told_version(request)
        return msgspec.to_builtins(
            controller.enrolment.enroll(wish.token, wish.device, wish.request, edgefleet=version)
        )

    @api.post("/v1/renew")
    def renew(request: Request) -> Any:
        shown = _shown(request)
        if not shown:
            raise TrustError("certificate", "show the certificate that is to be renewed")
        return msgspec.to_builtins(controller.enrolment.renew(shown))

    @api.post("/v1/tokens", dependencies=by_operator)
    def token(wish: TokenWish) -> dict[str, str]:
        return {
            "token": controller.enrolment.token(
                wish.device_class, site=wish.site, device=wish.device, ttl_s=wish.ttl_s, role=wish.role
            )
        }

    @api.get("/v1/status", dependencies=by_operator)
    def status() -> dict[str, Any]:
        return views.status(controller)

    # -- blobs and metadata

    @api.head("/v1/blobs/{digest}", dependencies=by_operator)
    def has_blob(digest: str) -> Response:
        return Response(status_code=200 if controller.layout.has(digest) else 404)

    @api.get("/v1/blobs/{digest}", dependencies=by_reader)
    def get_blob(digest: str) -> FileResponse:
        if not controller.layout.has(digest):
            raise NotFoundError(f"no blob {digest}")
        return FileResponse(controller.layout.path(digest), media_type="application/octet-stream")

    @api.put("/v1/blobs/{digest}", dependencies=by_operator)
    async def put_blob(digest: str, request: Request) -> dict[str, Any]:
        size = await blobs.receive(request.stream(), digest, controller.layout, controller.settings.max_blob_bytes)
        return {"digest": digest, "size": size}

    @api.get("/v1/repo/{name}", dependencies=by_reader)
    def get_metadata(name: str) -> Response:
        content = controller.repository.read(name)
        if content is None:
            raise NotFoundError(f"no metadata file {name}")
        return Response(content, media_type="application/json")

    @api.post("/v1/repo", dependencies=by_operator)
    def put_metadata(files: dict[str, str]) -> dict[str, Any]:
        try:
            new = {name: base64.b64decode(content, validate=True) for name, content in files.items()}
        except binascii.Error as exc:
            raise InputError(f"signed metadata travels in base64: {exc}") from exc
        controller.publish_metadata(new)
        views.mark_signed(controller)
        return {"taken": sorted(files)}

    # -- classes, models, compiling

    @api.get("/v1/classes", dependencies=by_operator)
    def classes() -> list[dict[str, Any]]:
        with controller.database.read() as session:
            return [msgspec.json.decode(row.spec) for row in devices.list_classes(session)]

    @api.put("/v1/classes", dependencies=by_operator)
    def put_class(value: dict[str, Any]) -> dict[str, str]:
        manifest = parse_value(value)
        if not isinstance(manifest, DeviceClass):
            raise InputError(f"a {manifest.kind} is no DeviceClass")
        spec = msgspec.json.encode(manifest.model_dump(mode="json")).decode()
        with controller.database.write() as session:
            devices.put_class(session, manifest.name, spec, controller.clock.now())
        return {"name": manifest.name}

    @api.get("/v1/models", dependencies=by_operator)
    def models(model: str = "", version: str = "") -> list[dict[str, Any]]:
        return views.models(controller, model, version)

    @api.post("/v1/models", dependencies=by_operator)
    def add_model(wish: VersionWish) -> dict[str, str]:
        version = model_version.decode(controller.layout.read(wish.digest, MAX_VERSION_BYTES))
        if version.model == AGENT:
            raise InputError(f"no model may be called {AGENT}", hint="versions of the agent come by fleet agent add")
        missing = [digest for digest in model_version.blobs(version) if not controller.layout.has(digest)]
        if missing:
            raise InputError(f"blobs are missing: {', '.join(missing)}", hint="upload them first")
        with controller.database.write() as session:
            catalog.add_version(
                session, version.model, version.version, wish.digest, version.encode().decode(), controller.clock.now()
            )
        return {"model": version.model, "version": version.version, "digest": wish.digest}

    @api.get("/v1/agents", dependencies=by_operator)
    def agents() -> list[dict[str, Any]]:
        return views.agents(controller)

    @api.post("/v1/agents", dependencies=by_operator)
    def add_agent(wish: AgentWish) -> dict[str, Any]:
        version = agent_catalog.register(controller.database, controller.layout, wish.manifests, controller.clock.now())
        return next(shown for shown in views.agents(controller) if shown["version"] == version)

    @api.post("/v1/models/{model}/{version}/compile", dependencies=by_operator)
    def compile_model(model: str, version: str, wish: CompileWish) -> dict[str, str]:
        job = controller.compiling.submit(
            model, version, wish.device_class, ship_despite_quality=wish.ship_despite_quality
        )
        return {"job": job}

    @api.get("/v1/jobs", dependencies=by_operator)
    def list_jobs(unfinished: bool = False) -> list[dict[str, Any]]:
        return views.jobs(controller, unfinished=unfinished)

    @api.get("/v1/jobs/{job}", dependencies=by_operator)
    def get_job(job: str) -> dict[str, Any]:
        return views.one_job(controller, job)

    @api.get("/v1/models/{model}/{version}/log", dependencies=by_operator)
    def get_log(model: str, version: str, device_class: str) -> PlainTextResponse:
        with controller.database.read() as session:
            return PlainTextResponse(jobs.newest(session, model, version, device_class).log)

    @api.delete("/v1/jobs/{job}", dependencies=by_operator)
    def cancel_job(job: str) -> dict[str, str]:
        controller.compiling.cancel(job)
        return {"job": job, "state": "cancelled"}

    # -- workers

    api.include_router(work.routes(controller))

    @api.get("/v1/workers", dependencies=by_operator)
    def list_workers() -> list[dict[str, Any]]:
        return views.workers(controller)

    @api.delete("/v1/workers/{name}", dependencies=by_operator)
    def revoke_worker(name: str) -> dict[str, str]:
        with controller.database.write() as session:
            workers.revoke(session, name)
        return {"name": name, "state": "revoked"}

    # -- boards

    @api.get("/v1/devices", dependencies=by_operator)
    def list_devices() -> list[dict[str, Any]]:
        return views.boards(controller)

    @api.get("/v1/devices/{name}", dependencies=by_operator)
    def get_device(name: str) -> dict[str, Any]:
        return views.board(controller, name)

    @api.delete("/v1/devices/{name}", dependencies=by_operator)
    def revoke_device(name: str) -> dict[str, str]:
        with controller.database.write() as session:
            devices.revoke(session, name)
        return {"name": name, "state": "revoked"}

    @api.patch("/v1/devices/{name}/labels", dependencies=by_operator)
    def label_device(name: str, changes: dict[str, str | None]) -> dict[str, str]:
        with controller.database.write() as session:
            return devices.change_labels(session, name, changes)

    # -- rollouts

    def wished(value: dict[str, Any]) -> Rollout:
        manifest = parse_value(value)
        if not isinstance(manifest, Rollout):
            raise InputError(f"a {manifest.kind} is no Rollout")
        return manifest

    @api.post("/v1/rollouts", dependencies=by_operator)
    def create(wish: RolloutWish) -> dict[str, Any]:
        manifest = wished(wish.manifest)
        return views.rollout(controller, controller.rollouts.create(manifest.name, views.rollout_spec(manifest)))

    @api.post("/v1/rollouts/plan", dependencies=by_operator)
    def plan(wish: RolloutWish) -> Any:
        manifest = wished(wish.manifest)
        return msgspec.to_builtins(controller.rollouts.plan(manifest.name, views.rollout_spec(manifest)))

    @api.get("/v1/rollouts", dependencies=by_operator)
    def list_rollouts() -> list[dict[str, Any]]:
        with controller.database.read() as session:
            return [views.rollout_row(row) for row in rollouts.rows(session)]

    @api.get("/v1/rollouts/{name}", dependencies=by_operator)
    def get_rollout(name: str) -> dict[str, Any]:
        return views.rollout(controller, controller.rollouts.get(name))

    @api.post("/v1/rollouts/{name}/{kind}", dependencies=by_operator)
    def intend(name: str, kind: IntentKind) -> dict[str, Any]:
        if kind is IntentKind.NONE:
            raise InputError("pause, resume, abort or rollback?")
        controller.rollouts.intend(name, kind, "operator")
        return views.rollout(controller, controller.rollouts.get(name))

    return api
