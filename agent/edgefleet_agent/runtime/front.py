"""The Open Inference Protocol's resources: receives whole HTTP requests, hands on jobs, metadata and metrics.

Source: KServe Open Inference Protocol v2 (HTTP/REST), Triton's statistics and repository index extensions. Not served:
loading and unloading over HTTP (the agent alone decides what serves), tracing, shared memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote

import msgspec
from edgefleet_shared import __version__

from edgefleet_agent.runtime import metrics, protocol
from edgefleet_agent.runtime.http import BINARY, JSON, TEXT, Reply, Request
from edgefleet_agent.runtime.job import Job
from edgefleet_agent.runtime.protocol import OutputTensor, RequestError
from edgefleet_agent.runtime.switchboard import Switchboard
from edgefleet_agent.runtime.version import Version, VersionState

SERVER_NAME = "edgefleet-runtime"
EXTENSIONS = ("binary_tensor_data", "statistics")

_MODEL = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?(?:/(?P<what>infer|ready|stats))?")
_HEADER_LENGTH = b"inference-header-content-length"


class Front:
    """Routes requests.

    Args:
        gauges: values of the whole runtime for ``/metrics``.
    """

    def __init__(self, switchboard: Switchboard, gauges: Callable[[], dict[str, float]]) -> None:
        self._switchboard, self._gauges = switchboard, gauges
        self._fixed: dict[str, tuple[str, Callable[[], tuple[int, bytes, bytes]]]] = {
            "/v2": ("GET", self._server),
            "/v2/": ("GET", self._server),
            "/v2/health/live": ("GET", lambda: (200, b'{"live":true}', JSON)),
            "/v2/health/ready": ("GET", self._ready),
            "/v2/models/stats": ("GET", lambda: self._stats(None, None)),
            "/v2/repository/index": ("POST", self._index),
            "/metrics": ("GET", self._metrics),
        }

    def handle(self, request: Request, reply: Reply) -> None:
        """Answer one request through ``reply``, now or when its worker is done."""
        try:
            match = _MODEL.fullmatch(request.path)
            if match is not None and match["what"] == "infer":
                _only(request, "POST")
                self._infer(request, unquote(match["model"]), match["version"] and unquote(match["version"]), reply)
                return
            fixed = self._fixed.get(request.path)
            if fixed is not None:
                _only(request, fixed[0])
                status, body, content_type = fixed[1]()
            elif match is not None:
                _only(request, "GET")
                version = match["version"] and unquote(match["version"])
                status, body, content_type = self._model(unquote(match["model"]), version, match["what"])
            else:
                raise RequestError(404, f"nothing is served at {request.path[:200]!r}")
        except RequestError as exc:
            status, body, content_type = exc.status, protocol.error_body(exc.message), JSON
        reply(status, body, content_type, None)

    def _infer(self, request: Request, model: str, version: str | None, reply: Reply) -> None:
        header_length = request.headers.get(_HEADER_LENGTH)
        parsed = protocol.parse_infer(request.body, None if header_length is None else header_length.decode("latin-1"))

        def answer(name: str, number: str, outputs: list[OutputTensor]) -> None:
            body, length = protocol.encode_answer(parsed, name, number, outputs)
            reply(200, body, JSON if length is None else BINARY, length)

        def failure(error: RequestError) -> None:
            self._switchboard.failed += error.status >= 500
            reply(error.status, protocol.error_body(error.message), JSON, None)

        self._switchboard.submit(Job(model, version, parsed, answer, failure))

    def _server(self) -> tuple[int, bytes, bytes]:
        return _json({"name": SERVER_NAME, "version": __version__, "extensions": EXTENSIONS})

    def _ready(self) -> tuple[int, bytes, bytes]:
        ready = self._switchboard.ready
        return (200 if ready else 503), msgspec.json.encode({"ready": ready}), JSON

    def _model(self, model: str, version: str | None, what: str | None) -> tuple[int, bytes, bytes]:
        if what == "stats":
            return self._stats(model, version)
        found = self._switchboard.find(model, version)
        if what == "ready":
            ready = found.state is VersionState.READY or (version is None and self._switchboard.ready)
            body = {"name": model, "ready": ready}
            return (200 if ready else 503), msgspec.json.encode(body), JSON
        versions = [v.config.version for v in self._switchboard.versions() if v.config.model == model]
        return 200, protocol.model_metadata(found.config, versions), JSON

    def _stats(self, model: str | None, version: str | None) -> tuple[int, bytes, bytes]:
        if model is not None:
            self._switchboard.find(model, version)
        rows = [
            _statistics(v)
            for v in self._switchboard.versions()
            if model in (None, v.config.model) and version in (None, v.config.version)
        ]
        return _json({"model_stats": rows})

    def _index(self) -> tuple[int, bytes, bytes]:
        return _json(
            [
                {
                    "name": v.config.model,
                    "version": v.config.version,
                    "state": "READY" if v.state is VersionState.READY else "UNAVAILABLE",
                    "reason": v.last_problem,
                }
                for v in self._switchboard.versions()
            ]
        )

    def _metrics(self) -> tuple[int, bytes, bytes]:
        board = self._switchboard
        rows = [(v.config.model, v.config.version, board.is_serving(v), v.figures) for v in board.versions()]
        return 200, metrics.exposition(rows, self._gauges()), TEXT


def _statistics(version: Version) -> dict[str, object]:
    """One entry of Triton's statistics response; durations in ns."""
    figures = version.figures
    answered = figures.requests - figures.failed

    def part(count: int, ns: int) -> dict[str, int]:
        return {"count": count, "ns": ns}

    return {
        "name": version.config.model,
        "version": version.config.version,
        "inference_count": answered,
        "execution_count": answered,
        "inference_stats": {
            "success": part(answered, figures.latency_ns),
            "fail": part(figures.failed, 0),
            "queue": part(answered, figures.queue_ns),
            "compute_infer": part(answered, figures.compute_ns),
        },
    }


def _only(request: Request, method: str) -> None:
    if request.method != method and not (method == "GET" and request.method == "HEAD"):
        raise RequestError(405, f"{request.path[:200]} takes {method}")


def _json(value: object) -> tuple[int, bytes, bytes]:
    return 200, msgspec.json.encode(value), JSON
