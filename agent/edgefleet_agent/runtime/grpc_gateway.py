"""``fleet-runtime-grpc``: the Open Inference Protocol's gRPC face: receives gRPC calls, hands them to the runtime's Unix socket, and back.

A process of its own, for boards whose clients speak gRPC (``edgefleet-agent[grpc]``): the runtime stays small and has no network without
it, and its connections, swaps and counters are the same. Clients' shared memory is read and written here: the runtime asks the kernel whose a
connection is, and would be told this process's user.
Every resource that a client can take is bounded: the size of a message, the time until it is there, calls at once and in all.
Source: KServe Open Inference Protocol v2 (gRPC). Not served, and refused with a reason: streams, loading and unloading, tracing.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import grpc
import msgspec
from edgefleet_shared import logs, threads
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem
from google.protobuf.message import DecodeError, Message

from edgefleet_agent import notify
from edgefleet_agent.runtime import activation, grpc_bounds, grpc_health, unserved
from edgefleet_agent.runtime import grpc_messages as messages
from edgefleet_agent.runtime.body_room import room
from edgefleet_agent.runtime.grpc_answers import Answers
from edgefleet_agent.runtime.grpc_bounds import IDLE_LIMIT_S, LARGE_BYTES, LOOKAHEAD_BYTES, MAX_CALLS, MESSAGE_LIMIT_S
from edgefleet_agent.runtime.grpc_carrier import Carrier
from edgefleet_agent.runtime.grpc_messages import Bytes, CallError, pb
from edgefleet_agent.runtime.grpc_runtime import Call, Runtime
from edgefleet_agent.runtime.head import MAX_URL_BYTES
from edgefleet_agent.runtime.heap import Heap
from edgefleet_agent.runtime.memory import available_memory_bytes
from edgefleet_agent.runtime.protocol import RegionUse, RequestError
from edgefleet_agent.runtime.regions import Regions

SERVICE = "inference.GRPCInferenceService"
LOOK_S = 1.0  # how often silent calls are looked at
GRACE_S = 10.0
MAX_PATH_CHARACTERS = MAX_URL_BYTES // 2  # what is asked of the model comes behind it

REFUSED = {
    "ModelStreamInfer": unserved.STREAMS,
    "RepositoryModelLoad": unserved.LOADING,
    "RepositoryModelUnload": unserved.LOADING,
    "CudaSharedMemoryRegister": unserved.CUDA,
    "TraceSetting": unserved.TRACING,
    "LogSettings": unserved.LOGGING,
}


class SharedMemory:
    """The clients' regions. One thread at a time: what is unregistered is closed, and must not be read by its number any more."""

    def __init__(self) -> None:
        self._regions, self._lock = Regions(), threading.Lock()

    def register(self, call: Call, name: str, key: str, offset: int, byte_size: int) -> None:
        """Raises: RequestError."""
        with self._lock:
            self._regions.register(
                call, name, msgspec.json.encode({"key": key, "offset": offset, "byte_size": byte_size})
            )

    def unregister(self, call: Call, name: str | None) -> None:
        with self._lock:
            self._regions.unregister(call, name)

    def status(self, call: Call, name: str | None) -> list[dict[str, object]]:
        """Raises: RequestError."""
        with self._lock:
            return self._regions.status(call, name)

    def read(self, call: Call, use: RegionUse) -> Bytes:
        """Raises: RequestError."""
        content = bytearray(use.size)
        with self._lock:
            self._regions.find(call, use).read_into(use, memoryview(content))
        return content

    def write(self, call: Call, use: RegionUse, content: bytes) -> None:
        """Raises: RequestError."""
        with self._lock:
            self._regions.find(call, use).write(use, content)

    def tick(self) -> None:
        with self._lock:
            self._regions.tick()


class Gateway:
    """The calls.

    Args:
        request_bytes: how long a request may be, with what it has in regions.
    """

    def __init__(self, runtime: Runtime, memory: SharedMemory, request_bytes: int) -> None:
        self._runtime, self._memory, self._request_bytes = runtime, memory, request_bytes

    def server_live(self, request: Any, call: Call) -> Message:
        return pb.ServerLiveResponse(live=self._is("/v2/health/live", call))

    def server_ready(self, request: Any, call: Call) -> Message:
        return pb.ServerReadyResponse(ready=self._is("/v2/health/ready", call))

    def health(self, request: Any, call: Call) -> Message:
        return grpc_health.check(request, (SERVICE, grpc_health.SERVICE), lambda: self._is("/v2/health/ready", call))

    def model_ready(self, request: Any, call: Call) -> Message:
        return pb.ModelReadyResponse(ready=self._is(_path(request.name, request.version) + "/ready", call))

    def server_metadata(self, request: Any, call: Call) -> Message:
        found = self._json("GET", "/v2", call)
        found["extensions"] = [name for name in found["extensions"] if name != "binary_tensor_data"]  # that is HTTP's
        return messages.described(found, pb.ServerMetadataResponse)

    def model_metadata(self, request: Any, call: Call) -> Message:
        return messages.described(
            self._json("GET", _path(request.name, request.version), call), pb.ModelMetadataResponse
        )

    def model_config(self, request: Any, call: Call) -> Message:
        found = self._json("GET", _path(request.name, request.version) + "/config", call)
        return messages.described({"config": found}, pb.ModelConfigResponse)

    def model_statistics(self, request: Any, call: Call) -> Message:
        path = _path(request.name, request.version) + "/stats" if request.name else "/v2/models/stats"
        return messages.described(self._json("GET", path, call), pb.ModelStatisticsResponse)

    def repository_index(self, request: Any, call: Call) -> Message:
        found = self._json("POST", "/v2/repository/index", call)
        models = [model for model in found if model["state"] == "READY" or not request.ready]
        return messages.described({"models": models}, pb.RepositoryIndexResponse)

    def memory_status(self, request: Any, call: Call) -> Message:
        found = self._memory.status(call, request.name or None)
        return messages.described({"regions": {r["name"]: r for r in found}}, pb.SystemSharedMemoryStatusResponse)

    def memory_register(self, request: Any, call: Call) -> Message:
        self._memory.register(call, request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    def memory_unregister(self, request: Any, call: Call) -> Message:
        self._memory.unregister(call, request.name or None)
        return pb.SystemSharedMemoryUnregisterResponse()

    def cuda_status(self, request: Any, call: Call) -> Message:
        return pb.CudaSharedMemoryStatusResponse()

    def cuda_unregister(self, request: Any, call: Call) -> Message:
        """There are none, so all have been forgotten already; programs that use shared memory begin with it."""
        return pb.CudaSharedMemoryUnregisterResponse()

    def model_infer(self, request: Any, call: Call) -> Message:
        regions = messages.wanted_regions(request)
        header, tensors = messages.to_http(request, lambda use: self._memory.read(call, use), self._request_bytes)
        status, body, length = self._runtime.ask(
            call, "POST", _path(request.model_name, request.model_version) + "/infer", (header, *tensors), len(header)
        )
        if status != 200:
            raise messages.failed(status, body)
        return messages.to_grpc(
            body[:length], body[length:], regions, lambda use, content: self._memory.write(call, use, content)
        )

    def _is(self, path: str, call: Call) -> bool:
        return self._runtime.ask(call, "GET", path)[0] == 200

    def _json(self, method: str, path: str, call: Call) -> Any:
        status, body, _ = self._runtime.ask(call, method, path)
        if status != 200:
            raise messages.failed(status, body)
        return msgspec.json.decode(body)


class Silence(threading.Thread):
    """Ends calls whose message does not come: each has a thread, and a few of them would have them all. Ticks for all others, too."""

    def __init__(self, memory: SharedMemory, answers: Answers, heap: Heap) -> None:
        super().__init__(name="silence", daemon=True)
        self._memory, self._answers, self._heap = memory, answers, heap
        self._began = dict[grpc.ServicerContext, float]()

    def message(self, sent: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """The call's message, as it came.

        Raises:
            CallError: it ended without one. grpc.RpcError: the call was cancelled.
        """
        self._began[context] = time.monotonic()
        try:
            return next(sent)
        except StopIteration:
            raise CallError("INVALID_ARGUMENT", "the call has no message") from None
        finally:
            del self._began[context]

    def run(self) -> None:
        while True:
            time.sleep(LOOK_S)
            horizon = time.monotonic() - MESSAGE_LIMIT_S
            for context, began in list(self._began.items()):
                if began < horizon:
                    context.cancel()
            self._memory.tick()
            self._answers.tick()
            self._heap.tick()


def _path(model: str, version: str) -> str:
    """Where the HTTP face has a model. Raises CallError: it would take no such path."""
    path = f"/v2/models/{quote(model, safe='')}"
    path += f"/versions/{quote(version, safe='')}" if version else ""
    if len(path) > MAX_PATH_CHARACTERS:
        raise CallError("NOT_FOUND", f"no model here has a name as long as {model[:40]!r}... or such a version")
    return path


def serve(runtime: Runtime, address: str) -> tuple[grpc.Server, int]:
    """Start serving at ``address`` (``HOST:PORT`` or ``unix:PATH``); the server and its port.

    Raises:
        EnvironmentProblem: the address can't be taken, or the board has no room for the threads.
    """
    room_bytes = room(available_memory_bytes())
    calls_at_once, message_bytes = grpc_bounds.messages(room_bytes)
    memory, heap = SharedMemory(), runtime.heap
    answers = Answers(room_bytes, heap)
    gateway, silence = Gateway(runtime, memory, message_bytes), Silence(memory, answers, heap)
    calls: dict[str, Callable[[Any, Call], Message]] = {
        "ServerLive": gateway.server_live,
        "ServerReady": gateway.server_ready,
        "ModelReady": gateway.model_ready,
        "ServerMetadata": gateway.server_metadata,
        "ModelMetadata": gateway.model_metadata,
        "ModelConfig": gateway.model_config,
        "ModelStatistics": gateway.model_statistics,
        "RepositoryIndex": gateway.repository_index,
        "SystemSharedMemoryStatus": gateway.memory_status,
        "SystemSharedMemoryRegister": gateway.memory_register,
        "SystemSharedMemoryUnregister": gateway.memory_unregister,
        "CudaSharedMemoryStatus": gateway.cuda_status,
        "CudaSharedMemoryUnregister": gateway.cuda_unregister,
    }
    limits = [
        ("grpc.max_receive_message_length", message_bytes),
        # Else on a fast line megabytes of each message come before there is a thread for it.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", int(MESSAGE_LIMIT_S * 1000)),
        ("grpc.max_connection_idle_ms", int(IDLE_LIMIT_S * 1000)),
    ]
    server = grpc.server(_threads(calls_at_once), options=limits, maximum_concurrent_rpcs=MAX_CALLS)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as exc:
        raise EnvironmentProblem(f"can't listen at {address}", hint="choose another with --listen HOST:PORT") from exc
    ours = None if address.startswith("unix:") else (address.rpartition(":")[0].strip("[]"), port)
    # Taken as streams that are read once: a call that sends one message looks the same, and one that sends none can be ended.
    large = threading.Lock()

    def handler(call: Callable[[Any, Call], Message], parse: Callable[[bytes], Any]) -> grpc.RpcMethodHandler:
        return grpc.stream_unary_rpc_method_handler(
            _answering(call, parse, large, silence, answers, heap, ours),
            response_serializer=lambda m: m.SerializeToString(),
        )

    def question(call: Callable[[Any, Call], Message], parse: Callable[[bytes], Any]) -> grpc.RpcMethodHandler:
        return handler(call, lambda message: messages.parse_question(message, parse))

    inference = {name: question(call, getattr(pb, f"{name}Request").FromString) for name, call in calls.items()}
    inference["ModelInfer"] = handler(gateway.model_infer, lambda m: messages.parse_request(m, message_bytes))
    for service, handlers, refused in (
        (SERVICE, inference, REFUSED),
        (grpc_health.SERVICE, {"Check": question(gateway.health, grpc_health.parse)}, grpc_health.REFUSED),
    ):
        handlers |= {name: grpc.stream_unary_rpc_method_handler(_refusing(why)) for name, why in refused.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    threads.start(silence)
    server.start()
    return server, port


def _threads(count: int) -> ThreadPoolExecutor:
    """So many threads, all started: one that is refused when a call needs it would end the thread that hears of calls.

    Raises:
        EnvironmentProblem: the board has no room for them.
    """
    pool, all_there = ThreadPoolExecutor(count), threading.Barrier(count + 1)
    try:
        for _ in range(count):
            pool.submit(all_there.wait)
    except RuntimeError as exc:
        all_there.abort()
        raise EnvironmentProblem(f"this machine has no room for {count} threads", hint=threads.ROOM_HINT) from exc
    all_there.wait()
    return pool


def _answering(
    carry_out: Callable[[Any, Call], Message],
    parse: Callable[[bytes], Any],
    large: threading.Lock,
    silence: Silence,
    answers: Answers,
    heap: Heap,
    ours: tuple[str, int] | None,
) -> Callable[[Iterator[bytes], grpc.ServicerContext], Message]:
    def answer(sent: Iterator[bytes], context: grpc.ServicerContext) -> Message:
        size = 0
        try:
            message = silence.message(sent, context)
            size, call = len(message), Call(context, ours)
            with _alone(large, call) if size > LARGE_BYTES else contextlib.nullcontext():
                request = parse(message)
                del message  # as large as the request, which is large
                made = carry_out(request, call)
            answers.hold(call, made.ByteSize())
            return made
        except DecodeError as exc:
            code, why = "INTERNAL", f"not a message of this call: {exc}"
        except RequestError as exc:
            code, why = messages.CODES.get(exc.status, "INTERNAL"), exc.message
        except CallError as exc:
            code, why = exc.code, exc.message
        finally:
            heap.held(size)
        # Out here, where no traceback keeps what the call held until the collector comes by.
        context.abort(getattr(grpc.StatusCode, code), why)
        raise AssertionError("abort raises")

    return answer


@contextlib.contextmanager
def _alone(large: threading.Lock, call: Call) -> Iterator[None]:
    """Be the only one. Raises CallError when nobody waits for it any more."""
    while not large.acquire(timeout=LOOK_S):
        if call.is_over:
            raise CallError("CANCELLED", "nobody waits for the answer any more")
    try:
        yield
    finally:
        large.release()


def _refusing(why: str) -> Callable[[Iterator[bytes], grpc.ServicerContext], bytes]:
    def refuse(sent: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, why)
        raise AssertionError("abort raises")

    return refuse


def _host_and_port(listen: str) -> str:
    """A loopback address as gRPC writes it.

    Raises:
        InputError, EnvironmentProblem: it is none.
    """
    from edgefleet_agent.runtime.app import parse_address

    address = parse_address(listen)
    if address is None:
        raise EnvironmentProblem("there is nothing to do with --listen off")
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--state", required=True, type=click.Path(path_type=Path, file_okay=False), help="The agent's state folder."
)
@click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    help="The runtime's Unix socket; default STATE/run/infer.sock.",
)
@click.option(
    "--listen",
    default="127.0.0.1:8001",
    show_default=True,
    help="Loopback HOST:PORT, port 0 picks a free one; or unix:PATH, where connections of sockets go that systemd holds.",
)
def main(state: Path, socket_path: Path | None, listen: str) -> None:
    """Serve the board's model over the Open Inference Protocol's gRPC face. The runtime must run beside it."""
    logs.configure()
    threading.excepthook = threads.end_with
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        held = activation.inherited()
        if held and not listen.startswith("unix:"):
            raise EnvironmentProblem(
                "systemd hands over sockets, and there is none of our own to carry their connections to",
                hint="--listen unix:PATH",
            )
        runtime = Runtime(socket_path or state.resolve() / "run" / "infer.sock")
        if listen.startswith("unix:"):
            server, shown = serve(runtime, listen)[0], listen
        else:
            host = _host_and_port(listen)
            server, port = serve(runtime, host)
            shown = f"{host.rpartition(':')[0]}:{port}"
    except EdgefleetError as exc:
        click.echo(f"fleet-runtime-grpc: {exc}", err=True)
        sys.exit(exc.exit_status)
    carrier = Carrier(held, Path(listen.removeprefix("unix:"))) if held else None
    if carrier is not None:
        threads.start(carrier)
    click.echo(f"listening at {shown}")
    notify.ready(f"listening at {shown}")
    stop.wait()
    notify.stopping()
    if carrier is not None:
        carrier.stop()
        carrier.join(GRACE_S)
    try:
        server.stop(GRACE_S).wait()
    except RuntimeError:  # of the thread that would cut them off after the grace; it takes no more calls from here on
        server.wait_for_termination(GRACE_S)


if __name__ == "__main__":
    main()
