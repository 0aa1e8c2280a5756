"""``fleet-runtime-grpc``: the Open Inference Protocol's gRPC face: receives gRPC calls, hands them to the runtime's Unix socket, and back.

A process of its own, for boards whose clients speak gRPC (``edgefleet-agent[grpc]``): the runtime stays small and has no network without
it, and its connections, swaps and counters are the same. Tensors pass as the bytes they are.
Source: KServe Open Inference Protocol v2 (gRPC), :file:`open_inference.proto`. Not served: shared memory (the runtime asks the kernel whose a
connection is, and would be told this process's user), BYTES and BF16 tensors, streaming, loading and unloading.
"""

from __future__ import annotations

import http.client
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import grpc
import msgspec
import numpy as np
from edgefleet_shared import logs
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem
from google.protobuf.message import Message

from edgefleet_agent import notify
from edgefleet_agent.runtime import open_inference_pb2
from edgefleet_agent.runtime.control import short_path
from edgefleet_agent.runtime.head import MAX_BODY_BYTES
from edgefleet_agent.runtime.json_data import MAX_PIECES
from edgefleet_agent.runtime.protocol import MAX_RANK
from edgefleet_agent.runtime.tensors import NUMPY, element_count

pb: Any = open_inference_pb2  # its messages are made from a descriptor when it is imported
SERVICE = "inference.GRPCInferenceService"
CALLS_AT_ONCE = 8
TIMEOUT_S = 90.0  # the runtime answers or refuses within 60 s
GRACE_S = 10.0

_CODES = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 413: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}
# Which field of InferTensorContents holds a datatype's values.
_CONTENTS = {
    "BOOL": "bool_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
}
_CONTENTS |= {f"INT{bits}": "int_contents" for bits in (8, 16, 32)} | {
    f"UINT{bits}": "uint_contents" for bits in (8, 16, 32)
}


class CallError(Exception):
    """A call that ends without an answer: its gRPC status and what is wrong."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        with short_path(self._path) as address:
            self.sock.connect(address)


class Runtime:
    """The runtime's Unix socket; each calling thread keeps a connection."""

    def __init__(self, path: Path) -> None:
        self._path, self._local = path, threading.local()

    def ask(
        self, method: str, path: str, body: bytes = b"", header_length: int | None = None
    ) -> tuple[int, bytes, int]:
        """One request: (status, body, length of the inference header in it).

        Raises:
            CallError: nobody answers there.
        """
        headers = {} if header_length is None else {"Inference-Header-Content-Length": str(header_length)}
        # A kept connection may have been closed meanwhile, by a runtime that was started again; an inference may be repeated.
        for attempt in (1, 2):
            connection = self._connection()
            try:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException) as exc:
                connection.close()
                if attempt == 2:
                    raise CallError("UNAVAILABLE", f"the runtime does not answer: {exc}") from exc
                continue
            break
        return response.status, content, int(response.getheader("Inference-Header-Content-Length", len(content)))

    def _connection(self) -> _Connection:
        if not hasattr(self._local, "connection"):
            self._local.connection = _Connection(self._path)
        connection: _Connection = self._local.connection
        return connection


class Gateway:
    """The six calls."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def server_live(self, request: Any) -> Message:
        return pb.ServerLiveResponse(live=self._runtime.ask("GET", "/v2/health/live")[0] == 200)

    def server_ready(self, request: Any) -> Message:
        return pb.ServerReadyResponse(ready=self._runtime.ask("GET", "/v2/health/ready")[0] == 200)

    def model_ready(self, request: Any) -> Message:
        return pb.ModelReadyResponse(
            ready=self._runtime.ask("GET", _path(request.name, request.version) + "/ready")[0] == 200
        )

    def server_metadata(self, request: Any) -> Message:
        return pb.ServerMetadataResponse(**self._json("/v2") | {"extensions": []})

    def model_metadata(self, request: Any) -> Message:
        return pb.ModelMetadataResponse(**self._json(_path(request.name, request.version)))

    def model_infer(self, request: Any) -> Message:
        header, tensors = to_http(request)
        status, body, length = self._runtime.ask(
            "POST",
            _path(request.model_name, request.model_version) + "/infer",
            b"".join((header, *tensors)),
            len(header),
        )
        if status != 200:
            raise _failed(status, body)
        return to_grpc(body[:length], body[length:])

    def _json(self, path: str) -> dict[str, Any]:
        status, body, _ = self._runtime.ask("GET", path)
        if status != 200:
            raise _failed(status, body)
        found: dict[str, Any] = msgspec.json.decode(body)
        return found


def _path(model: str, version: str) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def _failed(status: int, body: bytes) -> CallError:
    try:
        message = str(msgspec.json.decode(body)["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        message = f"the runtime answered with status {status}"
    return CallError(_CODES.get(status, "INTERNAL"), message)


def to_http(request: Any) -> tuple[bytes, list[bytes]]:
    """An infer request as the HTTP face takes it: its JSON header, and each input's bytes.

    Raises:
        CallError: raw and typed contents do not fit the inputs, or it needs shared memory.
    """
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise CallError("INVALID_ARGUMENT", f"{len(raw)} raw contents for {len(request.inputs)} inputs")
    inputs, tensors = [], []
    for number, tensor in enumerate(request.inputs):
        _refuse_regions(tensor)
        if raw and tensor.HasField("contents"):
            raise CallError("INVALID_ARGUMENT", f"input {tensor.name!r} has both raw and typed contents")
        tensors.append(raw[number] if raw else _typed(tensor))
        inputs.append(
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": {"binary_data_size": len(tensors[-1])},
            }
        )
    header: dict[str, Any] = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    if request.id:
        header["id"] = request.id
    if request.outputs:
        for output in request.outputs:
            _refuse_regions(output)
        header["outputs"] = [
            {
                "name": output.name,
                "parameters": {key: _value(value) for key, value in output.parameters.items()} | {"binary_data": True},
            }
            for output in request.outputs
        ]
    return msgspec.json.encode(header), tensors


def _refuse_regions(tensor: Any) -> None:
    if "shared_memory_region" in tensor.parameters:
        raise CallError("UNIMPLEMENTED", f"{tensor.name!r}: shared memory is served over HTTP only")


def _value(parameter: Any) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, kind) if kind else None


def _typed(tensor: Any) -> bytes:
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise CallError("INVALID_ARGUMENT", f"input {tensor.name!r}: {tensor.datatype!r} has no typed contents here")
    given = getattr(tensor.contents, field)
    # Each value becomes an object on its way: how many there are is looked at first.
    if len(given) != element_count(tensor.shape):
        raise CallError(
            "INVALID_ARGUMENT",
            f"input {tensor.name!r}: {len(given)} values do not fill shape {list(tensor.shape[: MAX_RANK + 1])}",
        )
    if len(given) > MAX_PIECES:
        raise CallError(
            "INVALID_ARGUMENT", f"input {tensor.name!r}: more than {MAX_PIECES} typed values; send raw contents"
        )
    values, dtype = np.array(given), NUMPY[tensor.datatype]
    if dtype.kind in "iu" and values.size:
        limits = np.iinfo(dtype)
        if int(values.min()) < limits.min or int(values.max()) > limits.max:
            raise CallError("INVALID_ARGUMENT", f"input {tensor.name!r}: a value does not fit {tensor.datatype}")
    return values.astype(dtype).tobytes()


def to_grpc(header: bytes, tensors: bytes) -> Message:
    """The HTTP face's answer as the message."""
    answer = msgspec.json.decode(header)
    message = pb.ModelInferResponse(
        model_name=answer["model_name"], model_version=answer["model_version"], id=answer.get("id", "")
    )
    at = 0
    for output in answer["outputs"]:
        message.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
        size = output["parameters"]["binary_data_size"]
        message.raw_output_contents.append(tensors[at : at + size])
        at += size
    return message


def serve(gateway: Gateway, address: str) -> tuple[grpc.Server, int]:
    """Start serving at ``address`` (``HOST:PORT`` or ``unix:PATH``); the server and its port.

    Raises:
        EnvironmentProblem: the address can't be taken.
    """
    calls: dict[str, tuple[Callable[[Any], Message], Any]] = {
        "ServerLive": (gateway.server_live, pb.ServerLiveRequest),
        "ServerReady": (gateway.server_ready, pb.ServerReadyRequest),
        "ModelReady": (gateway.model_ready, pb.ModelReadyRequest),
        "ServerMetadata": (gateway.server_metadata, pb.ServerMetadataRequest),
        "ModelMetadata": (gateway.model_metadata, pb.ModelMetadataRequest),
        "ModelInfer": (gateway.model_infer, pb.ModelInferRequest),
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(_answering(call), kind.FromString, lambda m: m.SerializeToString())
        for name, (call, kind) in calls.items()
    }
    limits = [
        ("grpc.max_receive_message_length", MAX_BODY_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
    ]
    server = grpc.server(ThreadPoolExecutor(CALLS_AT_ONCE), options=limits)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as exc:
        raise EnvironmentProblem(f"can't listen at {address}", hint="choose another with --listen HOST:PORT") from exc
    server.start()
    return server, port


def _answering(call: Callable[[Any], Message]) -> Callable[[Any, grpc.ServicerContext], Message]:
    def answer(request: Any, context: grpc.ServicerContext) -> Message:
        try:
            return call(request)
        except CallError as exc:
            context.abort(getattr(grpc.StatusCode, exc.code), exc.message)
            raise AssertionError("abort raises") from exc

    return answer


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
    help="Loopback HOST:PORT, port 0 picks a free one; or unix:PATH.",
)
def main(state: Path, socket_path: Path | None, listen: str) -> None:
    """Serve the board's model over the Open Inference Protocol's gRPC face. The runtime must run beside it."""
    logs.configure()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        gateway = Gateway(Runtime(socket_path or state.resolve() / "run" / "infer.sock"))
        if listen.startswith("unix:"):
            server, shown = serve(gateway, listen)[0], listen
        else:
            host = _host_and_port(listen)
            server, port = serve(gateway, host)
            shown = f"{host.rpartition(':')[0]}:{port}"
    except EdgefleetError as exc:
        click.echo(f"fleet-runtime-grpc: {exc}", err=True)
        sys.exit(exc.exit_status)
    click.echo(f"listening at {shown}")
    notify.ready(f"listening at {shown}")
    stop.wait()
    notify.stopping()
    server.stop(GRACE_S).wait()


if __name__ == "__main__":
    main()
