"""The gRPC face beside plain inferences: what Triton's client library asks, its shared memory, and clients that take and do not give."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http
import tritonclient.utils.shared_memory as triton_memory
from edgefleet_agent.runtime.grpc_bounds import CALLS_AT_ONCE, MAX_CALLS, MESSAGE_LIMIT_S
from edgefleet_agent.runtime.grpc_carrier import MAX_CONNECTIONS
from edgefleet_agent.runtime.head import MAX_BODY_BYTES
from edgefleet_agent.runtime.regions import MAX_OF_ONE_USER
from support import artifacts, control_group
from support.runtimes import Runtime, gateway, running, start_holding, until
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

X = np.random.default_rng(7).random((2, 8, 8, 3), np.float32)
ANSWER_BYTES = len(X) * artifacts.CLASSES * 4


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with running(tmp_path_factory.mktemp("board")) as made:
        made.install(made.add("1"))
        yield made.start()


@pytest.fixture(scope="module")
def address(runtime: Runtime) -> Iterator[str]:
    with gateway(runtime) as (found, _):
        yield found


@pytest.fixture
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    made = triton.InferenceServerClient(address)
    yield made
    made.close()


@pytest.fixture
def key() -> Iterator[str]:
    """The name of a shared memory object that nobody else uses."""
    name = f"edgefleet-test-{uuid.uuid4().hex}"
    yield name
    Path("/dev/shm", name).unlink(missing_ok=True)


def tensor(x: np.ndarray = X) -> triton.InferInput:
    made = triton.InferInput("x", list(x.shape), "FP32")
    made.set_data_from_numpy(x)
    return made


def request(x: np.ndarray = X) -> Any:
    made = service_pb2.ModelInferRequest(model_name="toy")
    made.inputs.add(name="x", datatype="FP32", shape=list(x.shape))
    made.raw_input_contents.append(x.tobytes())
    return made


def infer_of(channel: grpc.Channel) -> Any:
    return channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer", service_pb2.ModelInferRequest.SerializeToString,
        service_pb2.ModelInferResponse.FromString,
    )  # fmt: skip


def answers(client: triton.InferenceServerClient) -> bool:
    np.testing.assert_allclose(client.infer("toy", [tensor()]).as_numpy("y"), artifacts.truth(1, X), atol=1e-4)
    return True


def go_on(worker: int) -> None:
    with suppress(ProcessLookupError):  # its hang was found, and it was replaced
        os.kill(worker, signal.SIGCONT)


def found_again(client: triton.InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_ready())
    except InferenceServerException:
        return False


# --- what Triton's client asks


def test_tritonclient_reads_configuration_statistics_and_index(client: triton.InferenceServerClient) -> None:
    config = client.get_model_config("toy").config
    assert (config.name, config.backend) == ("toy", "onnxruntime")
    assert config.max_batch_size > 1
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("x", 11, [8, 8, 3])]  # 11 is TYPE_FP32
    (before,) = client.get_inference_statistics("toy").model_stats
    assert answers(client)
    (after,) = client.get_inference_statistics("toy", "1").model_stats
    assert after.inference_count - before.inference_count == len(X)
    assert after.execution_count - before.execution_count == 1
    assert after.inference_stats.success.ns > before.inference_stats.success.ns
    assert after.last_inference > before.last_inference
    assert [m.name for m in client.get_inference_statistics().model_stats] == ["toy"]
    assert [(m.name, m.version, m.state) for m in client.get_model_repository_index().models] == [("toy", "1", "READY")]
    assert "system_shared_memory" in client.get_server_metadata().extensions
    for ask in (client.get_model_config, client.get_inference_statistics):
        with pytest.raises(InferenceServerException, match="not served here") as caught:
            ask("other")
        assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_what_is_not_served_is_refused_with_its_reason(client: triton.InferenceServerClient) -> None:
    for ask, why in (
        (lambda: client.load_model("toy"), "agent alone"),
        (lambda: client.unload_model("toy"), "agent alone"),
        (client.get_trace_settings, "no tracing"),
        (client.get_log_settings, "no log settings"),
        (lambda: client.register_cuda_shared_memory("r", b"AAAA", 0, 64), "use system shared memory"),
    ):
        with pytest.raises(InferenceServerException, match=why) as caught:
            ask()
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
    heard: list[Any] = []
    client.start_stream(callback=lambda result, error: heard.append(error))
    until(lambda: heard, what="the stream being refused")
    client.stop_stream()
    assert "streams are not served" in str(heard[0])
    assert answers(client)


def test_tritonclient_infers_from_and_into_its_shared_memory(client: triton.InferenceServerClient, key: str) -> None:
    """As its example does: it forgets both kinds of regions first, and its object is nobody's but its own."""
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    handle = triton_memory.create_shared_memory_region("pictures", key, X.nbytes + ANSWER_BYTES)
    try:
        client.register_system_shared_memory("pictures", key, X.nbytes + ANSWER_BYTES)
        assert client.get_system_shared_memory_status().regions["pictures"].byte_size == X.nbytes + ANSWER_BYTES
        given = triton.InferInput("x", list(X.shape), "FP32")
        given.set_shared_memory("pictures", X.nbytes)
        output = triton.InferRequestedOutput("y")
        output.set_shared_memory("pictures", ANSWER_BYTES, offset=X.nbytes)
        for seed in range(3):
            x = np.random.default_rng(seed).random(X.shape, np.float32)
            triton_memory.set_shared_memory_region(handle, [x])
            result = client.infer("toy", [given], outputs=[output])
            assert result.get_output("y").parameters["shared_memory_byte_size"].int64_param == ANSWER_BYTES
            answer = triton_memory.get_contents_as_numpy(
                handle, np.float32, [len(X), artifacts.CLASSES], offset=X.nbytes
            )
            np.testing.assert_allclose(answer, artifacts.truth(1, x), atol=1e-4)
        output.set_shared_memory("pictures", 8, offset=X.nbytes)
        with pytest.raises(InferenceServerException, match="room is for 8"):
            client.infer("toy", [given], outputs=[output])
        with pytest.raises(InferenceServerException, match="registered already"):
            client.register_system_shared_memory("pictures", key, X.nbytes)
        client.unregister_system_shared_memory("pictures")
        with pytest.raises(InferenceServerException, match="no shared memory region"):
            client.infer("toy", [given])
        assert answers(client)
    finally:
        triton_memory.destroy_shared_memory_region(handle)


def test_a_client_with_too_many_regions_is_told_that_trying_again_does_not_help(
    runtime: Runtime, client: triton.InferenceServerClient, key: str
) -> None:
    region = triton_memory.create_shared_memory_region("one", f"/{key}", 64)
    http = triton_http.InferenceServerClient("{}:{}".format(*runtime.address))
    try:
        for face, code in ((client, "StatusCode.RESOURCE_EXHAUSTED"), (http, "429")):
            for number in range(MAX_OF_ONE_USER):
                face.register_system_shared_memory(f"region-{number}", f"/{key}", 64)
            with pytest.raises(InferenceServerException, match="too many regions") as refused:
                face.register_system_shared_memory("one-more", f"/{key}", 64)
            assert refused.value.status() == code
            face.unregister_system_shared_memory("region-0")
            face.register_system_shared_memory("one-more", f"/{key}", 64)
            face.unregister_system_shared_memory()
    finally:
        http.close()
        triton_memory.destroy_shared_memory_region(region)


def test_where_nobody_tells_whose_a_connection_is_only_open_objects_are_taken(
    runtime: Runtime, tmp_path: Path, key: str
) -> None:
    handle = triton_memory.create_shared_memory_region("pictures", key, X.nbytes)
    try:
        with gateway(runtime, f"unix:{tmp_path / 'grpc.sock'}") as (found, _):
            client = triton.InferenceServerClient(found)
            with pytest.raises(InferenceServerException, match="does not tell whose"):
                client.register_system_shared_memory("pictures", key, X.nbytes)
            Path("/dev/shm", key).chmod(0o666)
            client.register_system_shared_memory("pictures", key, X.nbytes)
            client.close()
    finally:
        triton_memory.destroy_shared_memory_region(handle)


# --- clients that take and do not give


def test_calls_whose_message_never_comes_do_not_keep_others_out(
    client: triton.InferenceServerClient, address: str
) -> None:
    never = threading.Event()

    def silence() -> Iterator[bytes]:
        never.wait(60)
        yield from ()

    with grpc.insecure_channel(address) as channel:
        silent = [
            channel.stream_unary("/inference.GRPCInferenceService/ModelInfer").future(silence())
            for _ in range(CALLS_AT_ONCE)
        ]
        assert client.infer("toy", [tensor()], client_timeout=40) is not None
        assert answers(client)
        codes = {call.exception(timeout=30).code() for call in silent}
        assert codes == {grpc.StatusCode.CANCELLED}
        never.set()


def test_calls_that_nobody_waits_for_any_more_give_their_threads_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("board")) as runtime:
        runtime.install(runtime.add("1"))
        runtime.start()
        with gateway(runtime) as (found, _), grpc.insecure_channel(found) as channel:
            infer = infer_of(channel)
            assert len(infer(request(), timeout=30).outputs) == 1
            worker = runtime.version("1").pid
            os.kill(worker, signal.SIGSTOP)
            try:
                hopeless = [infer.future(request(), timeout=1) for _ in range(2 * CALLS_AT_ONCE)]
                codes = {call.exception(timeout=30).code() for call in hopeless}
                assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED}
                client = triton.InferenceServerClient(found)
                assert client.is_server_live(client_timeout=5)  # the hang is found, and the worker replaced, only later
                client.close()
            finally:
                go_on(worker)
            assert len(infer(request(), timeout=30).outputs) == 1


@pytest.mark.parametrize(
    "greeting", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"], ids=["silent", "idle"]
)
def test_programs_that_forget_their_connections_do_not_keep_others_out(runtime: Runtime, greeting: bytes) -> None:
    own = [("grpc.use_local_subchannel_pool", 1)]  # else the library shares connections within this process
    with gateway(runtime) as (address, process):
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (150, 150))
        host, _, port = address.rpartition(":")
        forgotten = [socket.create_connection((host, int(port))) for _ in range(200)]
        for link in forgotten:
            link.sendall(greeting)
        until(lambda: len(os.listdir(f"/proc/{process.pid}/fd")) > 148, what="no descriptor being left")
        with grpc.insecure_channel(address, options=own) as channel:
            live = channel.unary_unary(
                "/inference.GRPCInferenceService/ServerLive", service_pb2.ServerLiveRequest.SerializeToString,
                service_pb2.ServerLiveResponse.FromString,
            )  # fmt: skip
            assert live(service_pb2.ServerLiveRequest(), timeout=3 * MESSAGE_LIMIT_S, wait_for_ready=True).live
        for link in forgotten:
            link.close()


def test_more_calls_than_anybody_needs_are_refused_at_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("board")) as runtime:
        runtime.install(runtime.add("1"))
        runtime.start()
        with gateway(runtime) as (found, _), grpc.insecure_channel(found) as channel:
            infer = infer_of(channel)
            worker = runtime.version("1").pid
            os.kill(worker, signal.SIGSTOP)
            try:
                calls = [infer.future(request(), timeout=60) for _ in range(MAX_CALLS + 50)]
                until(lambda: sum(call.done() for call in calls) >= 50, what="calls being refused")
                refused = [call for call in calls if call.done()]
                assert {call.exception().code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            finally:
                go_on(worker)
            assert sum(call.exception(timeout=60) is None for call in calls) == MAX_CALLS


def test_a_message_that_fits_but_whose_request_would_not_is_refused_as_too_large(
    client: triton.InferenceServerClient, address: str
) -> None:
    """The HTTP face would hang up on it in the middle."""
    made = service_pb2.ModelInferRequest(model_name="toy")
    made.inputs.add(name="x", datatype="UINT8", shape=[1])
    made.raw_input_contents.append(bytes(MAX_BODY_BYTES - made.ByteSize() - 5))
    assert MAX_BODY_BYTES - 8 <= made.ByteSize() <= MAX_BODY_BYTES
    with (
        grpc.insecure_channel(address, [("grpc.max_send_message_length", -1)]) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        infer_of(channel)(made, timeout=60)
    assert (caught.value.code().name, f"{MAX_BODY_BYTES} are allowed" in caught.value.details()) == (
        "RESOURCE_EXHAUSTED",
        True,
    )
    assert answers(client)


def test_a_client_finds_the_gateway_again_that_was_killed_and_started_again(runtime: Runtime) -> None:
    with gateway(runtime) as (found, process):
        client = triton.InferenceServerClient(found)
        assert answers(client)
        process.kill()
        process.wait()
        with pytest.raises(InferenceServerException):
            client.infer("toy", [tensor()], client_timeout=5)
        with gateway(runtime, found) as (again, _):
            assert again == found
            until(lambda: found_again(client), what="the gateway being found again")
            assert answers(client)
            client.close()


def refused_at_once(found: str, clients: int, size: int) -> list[grpc.RpcError]:
    """How messages of ``size`` bytes end that so many clients send at once; they are too large for the toy's slots."""
    made = service_pb2.ModelInferRequest(model_name="toy")
    rows = size // (192 * 4)
    made.inputs.add(name="x", datatype="FP32", shape=[rows, 8, 8, 3])
    made.raw_input_contents.append(bytes(rows * 192 * 4))
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]

    def ask(_: int) -> grpc.RpcError:
        with grpc.insecure_channel(found, options) as channel, pytest.raises(grpc.RpcError) as caught:
            infer_of(channel)(made, timeout=120)
        return caught.value

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, range(clients)))


@pytest.mark.parametrize("size", [28 << 20, 60 << 20])
def test_many_large_messages_at_once_are_not_the_end_of_the_gateway_of_a_small_board(
    runtime: Runtime, size: int
) -> None:
    with (
        control_group.made() as group,
        gateway(runtime, preexec_fn=group.join) as (found, process),
    ):
        refused = {error.code().name for error in refused_at_once(found, 12, size)}
        assert process.poll() is None
        assert refused == {"RESOURCE_EXHAUSTED"}
        client = triton.InferenceServerClient(found)
        assert answers(client)
        client.close()


def test_many_large_messages_at_once_take_no_multiple_of_their_size_and_leave_nothing(runtime: Runtime) -> None:
    """They are taken apart one at a time, what is refused is let go at once, and what they took goes back to the kernel."""
    clients = 12
    with gateway(runtime) as (found, process):

        def kibibytes(name: str) -> int:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            return int(status[name].split()[0])

        before = kibibytes("VmRSS")
        refused = refused_at_once(found, clients, MAX_BODY_BYTES - (1 << 17))
        assert [error.code().name for error in refused] == ["RESOURCE_EXHAUSTED"] * clients
        assert kibibytes("VmHWM") * 1024 < 2 * clients * MAX_BODY_BYTES
        until(lambda: kibibytes("VmRSS") - before < MAX_BODY_BYTES >> 10, what="the memory being given back")


def test_a_restart_of_the_gateway_ends_no_call_and_refuses_no_client(runtime: Runtime) -> None:
    """As systemd restarts it, which holds the port: what is under way is answered, who comes meanwhile waits for the next one."""
    worker = runtime.version("1").pid
    with socket.create_server(("127.0.0.1", 0), backlog=16) as port:
        here = "{}:{}".format(*port.getsockname())
        listen = f"unix:{runtime.state}/run/grpc.sock"
        answers: list[Any] = []
        with gateway(runtime, listen, held=(port,)) as (_, process):
            client = triton.InferenceServerClient(here)
            assert client.is_server_ready()
            os.kill(worker, signal.SIGSTOP)
            try:
                for _ in range(CALLS_AT_ONCE + 4):  # those above it wait in the gateway
                    client.async_infer("toy", [tensor()], lambda result, error: answers.append(result or error))
                until(lambda: runtime.version("1").in_flight >= CALLS_AT_ONCE, what="calls under way")
                process.terminate()
                until(lambda: not _answers(port.getsockname()), what="it takes no more")
                late = triton.InferenceServerClient(here)
                late.async_infer("toy", [tensor()], lambda result, error: answers.append(result or error))
            finally:
                os.kill(worker, signal.SIGCONT)
            until(lambda: len(answers) == CALLS_AT_ONCE + 4, what="what was under way is answered")
            assert process.wait(20) == 0
        with gateway(runtime, listen, held=(port,)):
            until(lambda: len(answers) == CALLS_AT_ONCE + 5, what="who came meanwhile is answered")
            client.close()
            late.close()
    for answer in answers:
        assert isinstance(answer, triton.InferResult), answer
        assert np.allclose(answer.as_numpy("y"), artifacts.truth(1, X), atol=1e-3)


def _answers(address: tuple[str, int]) -> bool:
    """Whether somebody takes a new connection there and speaks first, as servers of HTTP/2 do."""
    with socket.create_connection(address) as link:
        link.settimeout(0.5)
        link.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        with suppress(TimeoutError):
            return bool(link.recv(9))
    return False


def test_programs_that_take_all_connections_that_are_carried_and_say_nothing_are_let_go(runtime: Runtime) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=MAX_CONNECTIONS) as port:
        address = port.getsockname()
        with gateway(runtime, f"unix:{runtime.state}/run/grpc.sock", held=(port,)), ExitStack() as silent:
            for _ in range(MAX_CONNECTIONS):
                silent.enter_context(socket.create_connection(address))
            client = triton.InferenceServerClient("{}:{}".format(*address))
            until(lambda: _is_ready(client), MESSAGE_LIMIT_S + 40, "an honest client is answered")
            client.close()


def _is_ready(client: triton.InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_ready(client_timeout=5.0))
    except InferenceServerException:
        return False


def test_sockets_of_systemd_need_a_socket_to_carry_them_to(runtime: Runtime) -> None:
    with socket.create_server(("127.0.0.1", 0)) as port:
        process = start_holding(
            (port,), [sys.executable, "-m", "edgefleet_agent.runtime.grpc_gateway", "--state", str(runtime.state)],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert "--listen unix:PATH" in process.communicate(timeout=30)[1]
        assert process.returncode != 0
