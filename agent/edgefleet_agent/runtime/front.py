"""The Open Inference Protocol's resources: receives whole HTTP requests, hands on jobs, metadata and metrics.

Source: KServe Open Inference Protocol v2 (HTTP/REST), Triton's statistics, repository index, model configuration and system shared memory
extensions.
Not served: loading and unloading over HTTP (the agent alone decides what serves), tracing, CUDA shared memory.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, Generator
from functools import lru_cache, partial
from typing import Any, TypeVar
from urllib.parse import unquote

import msgspec
from edgefleet_shared import __version__

from edgefleet_agent.runtime import answer as answers
from edgefleet_agent.runtime import content_encoding, metrics, protocol, turns, unserved
from edgefleet_agent.runtime.control import VersionState
from edgefleet_agent.runtime.exchange import BINARY, JSON, TEXT, Place, Reply, Request
from edgefleet_agent.runtime.head import Head, Refused
from edgefleet_agent.runtime.job import NO_MEMORY, Job, Lease
from edgefleet_agent.runtime.metrics import Figures
from edgefleet_agent.runtime.peer import Peer
from edgefleet_agent.runtime.protocol import Form, InferRequest, InputTensor, OutputTensor, RequestError
from edgefleet_agent.runtime.regions import Regions
from edgefleet_agent.runtime.switchboard import Switchboard
from edgefleet_agent.runtime.version import Version

SERVER_NAME = "edgefleet-runtime"
EXTENSIONS = ("binary_tensor_data", "statistics", "system_shared_memory", "model_configuration")

_MadeT = TypeVar("_MadeT")
_MODEL = re.compile(
    r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?(?:/(?P<what>infer|ready|stats|config))?"
)
# Programs that use Triton's regions begin by forgetting those of both kinds.
_CUDA_REGIONS = re.compile(r"/v2/cudasharedmemory(?:/region/[^/]+)?/(?P<what>status|register|unregister)")
_REGIONS = re.compile(r"/v2/systemsharedmemory(?:/region/(?P<name>[^/]+))?/(?P<what>status|register|unregister)")


@lru_cache(256)
def _model_path(path: str) -> tuple[str, str | None, str | None] | None:
    """(model, version, what) of a model's resource, None for another path."""
    match = _MODEL.fullmatch(path)
    if match is None:
        return None
    return unquote(match["model"]), match["version"] and unquote(match["version"]), match["what"]


class Front:
    """Routes requests.

    Args:
        gauges: values of the whole runtime for ``/metrics``.
    """

    def __init__(self, switchboard: Switchboard, regions: Regions, gauges: Callable[[], dict[str, float]]) -> None:
        self._switchboard, self._regions, self._gauges = switchboard, regions, gauges
        self._one_long, self._working = asyncio.Lock(), set[asyncio.Task[None]]()
        self._fixed: dict[str, tuple[str, Callable[[], tuple[int, bytes, bytes]]]] = {
            "/v2": ("GET", self._server),
            "/v2/": ("GET", self._server),
            "/v2/health/live": ("GET", lambda: (200, b'{"live":true}', JSON)),
            "/v2/health/ready": ("GET", self._ready),
            "/v2/models/stats": ("GET", lambda: self._stats(None, None)),
            "/v2/repository/index": ("POST", self._index),
            "/metrics": ("GET", self._metrics),
        }

    def place(self, head: Head, begun: bytes, peer: Peer) -> Place | None:
        """A slot of the worker that will compute a request with this head, if it has one to spare.

        What such a request means is found out here as far as ``begun`` tells, while the rest of it comes.
        """
        wanted = _model_path(head.path)
        if wanted is None or wanted[2] != "infer" or head.inference_length is None or head.encoding is not None:
            return None
        lease = self._switchboard.lend(wanted[0], wanted[1], head.inference_length, head.content_length)
        if lease is not None and head.method == "POST":
            lease.job = self._expected(lease, begun[: int(head.inference_length)], wanted[0], wanted[1], peer)
        return lease

    def _expected(self, lease: Lease, header: bytes, model: str, version: str | None, peer: Peer) -> _Asked | None:
        """The request whose body will come into ``lease``; None where that needs a second look."""
        try:
            form = protocol.parse_form(header)
        except RequestError:
            return None  # also a header that is not whole yet
        binary = lease.view[len(header) :]
        if form.uses_regions or len(binary) != form.binary_bytes:
            return None
        return _Asked(self, peer, model, version, InferRequest(form, binary), lease)

    def handle(self, request: Request, reply: Reply) -> None:
        """Answer one request through ``reply``, now or when its worker is done."""
        try:
            asked = request.place.take_job() if request.place is not None else None
            if asked is not None:
                asked.begin(reply)
                self._switchboard.submit(asked)
                return
            if request.head.encoding is not None and not self._unpack(request, request.head.encoding, reply):
                return
        except (RequestError, Refused) as exc:
            _refuse(reply, exc)
            return
        self._answer(request, reply)

    def _answer(self, request: Request, reply: Reply) -> None:
        """Answer a request whose body is plain."""
        try:
            wanted = _model_path(request.head.path)
            if wanted is not None and wanted[2] == "infer":
                _only(request, "POST")
                self._infer(request, wanted[0], wanted[1], reply)
                return
            status, body, content_type = self._resource(request, wanted)
        except _WrongMethod as exc:
            reply(exc.status, answers.error_body(exc.message), JSON, None, exc.allow)
            return
        except RequestError as exc:
            status, body, content_type = exc.status, answers.error_body(exc.message), JSON
        reply(status, body, content_type)

    def _unpack(self, request: Request, encoding: str, reply: Reply) -> bool:
        """Unpack a request's body; False where that is a long work, and it is answered later.

        Raises:
            Refused, RequestError: it is not what it says, or there is no room for what it is.
        """
        steps = content_encoding.decompress(request.body, encoding)
        try:
            next(steps)
        except StopIteration as end:
            request.unpack(end.value)
            return True
        except MemoryError:
            raise RequestError(503, NO_MEMORY) from None
        self.work(self._unpack_in_pieces(request, steps, reply), partial(_refuse, reply))
        return False

    async def _unpack_in_pieces(
        self, request: Request, steps: Generator[None, None, bytes | bytearray | memoryview], reply: Reply
    ) -> None:
        request.unpack(await self.in_pieces(steps))
        self._answer(request, reply)

    def _resource(
        self, request: Request, wanted: tuple[str, str | None, str | None] | None
    ) -> tuple[int, bytes, bytes]:
        path = request.head.path
        fixed = self._fixed.get(path)
        if fixed is not None:
            _only(request, fixed[0])
            return fixed[1]()
        if wanted is not None:
            _only(request, "GET")
            return self._model(*wanted)
        match = _REGIONS.fullmatch(path)
        if match is not None:
            return self._region(request, match["name"] and unquote(match["name"]), match["what"])
        match = _CUDA_REGIONS.fullmatch(path)
        if match is not None:
            return _cuda_region(request, match["what"])
        raise RequestError(404, unserved.why(path) or f"nothing is served at {path[:200]!r}")

    def _region(self, request: Request, name: str | None, what: str) -> tuple[int, bytes, bytes]:
        if what == "status":
            _only(request, "GET")
            return _json(self._regions.status(request.peer, name))
        _only(request, "POST")
        if what == "unregister":
            self._regions.unregister(request.peer, name)
        elif name is None:
            raise RequestError(400, "a registration needs the region's name in its path")
        else:
            self._regions.register(request.peer, name, request.body)
        return 200, b"", JSON

    def _infer(self, request: Request, model: str, version: str | None, reply: Reply) -> None:
        if protocol.is_long(request.body, request.head.inference_length):
            self.work(self._infer_in_pieces(request, model, version, reply), partial(_refuse, reply))
            return
        try:
            parsed = protocol.parse_infer(request.body, request.head.inference_length)
        except MemoryError:
            raise RequestError(503, NO_MEMORY) from None
        self._ask(request, parsed, model, version, reply)

    async def _infer_in_pieces(self, request: Request, model: str, version: str | None, reply: Reply) -> None:
        """A request with so much JSON that parsing it at once would keep all others waiting."""
        parsed = await self.in_pieces(protocol.parse_long_infer(request.body, request.head.inference_length))
        self._ask(request, parsed, model, version, reply)

    async def in_pieces(self, steps: Generator[None, None, _MadeT]) -> _MadeT:
        """What comes of work that others have their turn between. One at a time: each takes memory."""
        async with self._one_long:
            return await turns.through(steps)

    def work(self, work: Coroutine[Any, Any, None], refuse: Callable[[RequestError], None]) -> None:
        """Do what answers a request in its own time; ``refuse`` tells its client when that comes to nothing, whatever the reason is."""
        task = asyncio.get_running_loop().create_task(_told(work, refuse))
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    def _ask(self, request: Request, parsed: InferRequest, model: str, version: str | None, reply: Reply) -> None:
        form, peer = parsed.form, request.peer
        if form.uses_regions:
            inputs = parsed.inputs if form.binary_bytes else form.inputs
            parsed = InferRequest(form, memoryview(b""), [self._reach(peer, tensor) for tensor in inputs])
        asked = _Asked(self, peer, model, version, parsed, request.place)
        asked.begin(reply)
        self._switchboard.submit(asked)

    def failed(self) -> None:
        """A request that was taken could not be answered."""
        self._switchboard.failed += 1

    def _reach(self, peer: Peer, tensor: InputTensor) -> InputTensor:
        """The tensor with its region behind it."""
        use = tensor.region
        if use is None:
            return tensor
        region = self._regions.find(peer, use)
        return InputTensor(
            tensor.name, tensor.datatype, tensor.shape, partial(region.read_into, use), tensor.size, region=use
        )

    def store(self, peer: Peer, form: Form, outputs: list[OutputTensor]) -> None:
        """Put the outputs that the client wants in regions there."""
        for tensor in outputs:
            wanted = form.outputs.get(tensor.name) if form.outputs is not None else None
            if wanted is not None and wanted.region is not None:
                self._regions.find(peer, wanted.region).write(wanted.region, tensor.data)

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
        if what == "config":
            return 200, answers.model_configuration(found.config, found.max_rows), JSON
        versions = [v.config.version for v in self._switchboard.versions() if v.config.model == model]
        return 200, answers.model_metadata(found.config, list(dict.fromkeys(versions))), JSON

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
        rows: dict[tuple[str, str], tuple[bool, Figures]] = {}
        for v in board.versions():
            name, version = v.config.model, v.config.version
            if (name, version) in rows:  # compiled again: two time series must not have one name
                version += f"@{v.manifest.removeprefix('sha256:')[:12]}"
            rows[name, version] = board.is_serving(v), v.figures
        return 200, metrics.exposition([(*key, *row) for key, row in rows.items()], self._gauges()), TEXT


class _Asked(Job):
    """An inference that was asked for over HTTP."""

    __slots__ = ("_front", "_peer", "_reply")

    def __init__(
        self, front: Front, peer: Peer, model: str, version: str | None, request: InferRequest, lease: Lease | None
    ) -> None:
        super().__init__(model, version, request, lease)
        self._front, self._peer = front, peer
        self._reply: Reply | None = None

    def begin(self, reply: Reply) -> None:
        """All of it is there."""
        self._reply = reply
        self.arrived_ns = time.perf_counter_ns()

    def answer(self, model: str, version: str, outputs: list[OutputTensor]) -> None:
        assert self._reply is not None
        if self.request.form.uses_regions:
            try:
                self._front.store(self._peer, self.request.form, outputs)
            except RequestError as exc:
                self.failure(exc)
                return
        if answers.is_long(self.request.form, outputs):
            self._front.work(self._answer_in_pieces(model, version, outputs), self.failure)
            return
        try:
            body, length = answers.encode_answer(self.request, model, version, outputs)
        except MemoryError:
            self.failure(RequestError(503, NO_MEMORY))
            return
        self._give(body, length)

    async def _answer_in_pieces(self, model: str, version: str, outputs: list[OutputTensor]) -> None:
        steps = answers.encode_long_answer(self.request, model, version, outputs)
        self._give(*await self._front.in_pieces(steps))

    def _give(self, body: bytes, header_length: int | None) -> None:
        assert self._reply is not None
        if not self._reply(200, body, JSON if header_length is None else BINARY, header_length):
            self._front.failed()

    def failure(self, error: RequestError) -> None:
        assert self._reply is not None
        if error.status >= 500:
            self._front.failed()
        _refuse(self._reply, error)


def _refuse(reply: Reply, error: RequestError | Refused) -> None:
    reply(error.status, answers.error_body(str(error)), JSON)


async def _told(work: Coroutine[Any, Any, None], refuse: Callable[[RequestError], None]) -> None:
    try:
        await work
    except RequestError as exc:
        refuse(exc)
    except Refused as exc:
        refuse(RequestError(exc.status, str(exc)))
    except MemoryError:
        refuse(RequestError(503, NO_MEMORY))
    except BaseException:
        refuse(RequestError(500, "the runtime failed over this request"))
        raise


def _statistics(version: Version) -> dict[str, object]:
    """One entry of Triton's statistics response; durations in ns, ``last_inference`` in ms since 1970.

    Tensors are copied while others are computed, so of what Triton has for that nothing is told; there is no cache.
    """
    figures = version.figures
    answered = figures.requests - figures.failed
    ago_ns = time.perf_counter_ns() - figures.last_ns

    def part(count: int, ns: int) -> dict[str, int]:
        return {"count": count, "ns": ns}

    nothing = part(0, 0)
    return {
        "name": version.config.model,
        "version": version.config.version,
        "last_inference": (time.time_ns() - ago_ns) // 1_000_000 if figures.last_ns else 0,
        "inference_count": figures.pictures,
        "execution_count": answered,
        "inference_stats": {
            "success": part(answered, figures.latency_ns),
            "fail": part(figures.failed, figures.failed_ns),
            "queue": part(answered, figures.queue_ns),
            "compute_input": nothing,
            "compute_infer": part(answered, figures.compute_ns),
            "compute_output": nothing,
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [],
    }


def _cuda_region(request: Request, what: str) -> tuple[int, bytes, bytes]:
    """There are none: nothing can be registered, and all have been forgotten already."""
    _only(request, "GET" if what == "status" else "POST")
    if what == "register":
        raise RequestError(400, unserved.CUDA)
    return _json([]) if what == "status" else (200, b"", JSON)


class _WrongMethod(RequestError):
    """A resource was asked in a way that it has not; ``allow`` are those that it has (RFC 9110, 15.5.6)."""

    def __init__(self, path: str, method: str) -> None:
        super().__init__(405, f"{path[:200]} takes {method}")
        self.allow = b"GET, HEAD" if method == "GET" else method.encode()


def _only(request: Request, method: str) -> None:
    if request.head.method != method and not (method == "GET" and request.head.method == "HEAD"):
        raise _WrongMethod(request.head.path, method)


def _json(value: object) -> tuple[int, bytes, bytes]:
    return 200, msgspec.json.encode(value), JSON
