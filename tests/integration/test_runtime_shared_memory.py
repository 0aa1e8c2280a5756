"""Triton's system shared memory extension: Triton's own client unchanged, and registrations that mean harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.utils.shared_memory as triton_memory
from support import artifacts
from support.runtimes import Runtime, UnixConnection, running
from tritonclient.utils import InferenceServerException

X = np.random.default_rng(7).random((4, 8, 8, 3), np.float32)
ANSWER_BYTES = 4 * artifacts.CLASSES * 4


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with running(tmp_path_factory.mktemp("board")) as made:
        made.install(made.add("1"))
        yield made.start()


@pytest.fixture
def key() -> Iterator[str]:
    """The name of a shared memory object that nobody else uses."""
    name = f"edgefleet-test-{uuid.uuid4().hex}"
    yield name
    Path("/dev/shm", name).unlink(missing_ok=True)


@pytest.fixture
def client(runtime: Runtime) -> Iterator[triton.InferenceServerClient]:
    made = triton.InferenceServerClient("{}:{}".format(*runtime.address))
    yield made
    made.unregister_system_shared_memory()
    made.close()


def still_serves(runtime: Runtime) -> None:
    status, answer = runtime.infer(X)
    assert status == 200
    np.testing.assert_allclose(answer["outputs"][0]["data"], artifacts.truth(1, X).ravel(), atol=1e-4)
    assert runtime.version("1").crashes == 0


def shared_input(name: str, x: np.ndarray = X, offset: int = 0) -> triton.InferInput:
    tensor = triton.InferInput("x", list(x.shape), "FP32")
    tensor.set_shared_memory(name, x.nbytes, offset=offset)
    return tensor


def test_tritonclient_infers_from_and_into_its_shared_memory(client: triton.InferenceServerClient, key: str) -> None:
    handle = triton_memory.create_shared_memory_region("pictures", key, X.nbytes + ANSWER_BYTES)
    try:
        assert "system_shared_memory" in client.get_server_metadata()["extensions"]
        client.register_system_shared_memory("pictures", key, X.nbytes + ANSWER_BYTES)
        output = triton.InferRequestedOutput("y")
        output.set_shared_memory("pictures", ANSWER_BYTES, offset=X.nbytes)
        for seed in range(5):
            x = np.random.default_rng(seed).random(X.shape, np.float32)
            triton_memory.set_shared_memory_region(handle, [x])
            result = client.infer("toy", [shared_input("pictures")], outputs=[output])
            assert result.get_output("y")["parameters"]["shared_memory_byte_size"] == ANSWER_BYTES
            answer = triton_memory.get_contents_as_numpy(handle, np.float32, [4, artifacts.CLASSES], offset=X.nbytes)
            np.testing.assert_allclose(answer, artifacts.truth(1, x), atol=1e-4)
    finally:
        client.unregister_system_shared_memory("pictures")
        triton_memory.destroy_shared_memory_region(handle)


def test_tritonclient_sees_what_it_registered_and_can_register_it_again_only_after_unregistering(
    client: triton.InferenceServerClient, key: str
) -> None:
    handle = triton_memory.create_shared_memory_region("a", key, 8192)
    try:
        client.register_system_shared_memory("a", key, 4096, offset=4096)
        (status,) = client.get_system_shared_memory_status()
        assert status == {"name": "a", "key": key, "offset": 4096, "byte_size": 4096}
        assert client.get_system_shared_memory_status("a") == [status]
        with pytest.raises(InferenceServerException, match="already"):
            client.register_system_shared_memory("a", key, 4096)
        client.unregister_system_shared_memory("a")
        client.unregister_system_shared_memory("a")
        assert client.get_system_shared_memory_status() == []
        client.register_system_shared_memory("a", key, 4096)
    finally:
        triton_memory.destroy_shared_memory_region(handle)


def test_the_unix_socket_takes_the_same_registrations(runtime: Runtime, key: str) -> None:
    Path("/dev/shm", key).write_bytes(X.tobytes())
    connection = UnixConnection(runtime.state / "run" / "infer.sock")

    def ask(method: str, path: str, body: object = None) -> tuple[int, bytes]:
        connection.request(method, path, json.dumps(body) if body is not None else None)
        response = connection.getresponse()
        return response.status, response.read()

    assert ask("POST", "/v2/systemsharedmemory/region/u/register", {"key": key, "byte_size": X.nbytes})[0] == 200
    parameters = {"shared_memory_region": "u", "shared_memory_byte_size": X.nbytes}
    tensor = {"name": "x", "datatype": "FP32", "shape": list(X.shape), "parameters": parameters}
    status, answer = ask("POST", "/v2/models/toy/infer", {"inputs": [tensor]})
    assert status == 200
    np.testing.assert_allclose(json.loads(answer)["outputs"][0]["data"], artifacts.truth(1, X).ravel(), atol=1e-4)
    assert ask("POST", "/v2/systemsharedmemory/unregister")[0] == 200
    assert ask("POST", "/v2/models/toy/infer", {"inputs": [tensor]})[0] == 400
    connection.close()


# --- registrations that mean harm


@pytest.mark.parametrize(
    "bad", ["", "/", "..", "/..", "../etc/passwd", "/../../etc/passwd", "a/b", "\0", "a\0b", "n" * 300, "//etc/passwd"]
)
def test_a_key_that_leads_elsewhere_is_refused(
    client: triton.InferenceServerClient, runtime: Runtime, bad: str
) -> None:
    with pytest.raises(InferenceServerException, match="no name of a shared memory object"):
        client.register_system_shared_memory("evil", bad, 16)
    still_serves(runtime)


def test_a_link_a_folder_a_pipe_and_nothing_are_no_shared_memory(
    client: triton.InferenceServerClient, runtime: Runtime, key: str, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"not yours")
    place = Path("/dev/shm", key)
    for make, remove in (
        (lambda: place.symlink_to(secret), place.unlink),
        (place.mkdir, place.rmdir),
        (lambda: os.mkfifo(place), place.unlink),
        (lambda: None, lambda: None),
    ):
        make()
        with pytest.raises(InferenceServerException):
            client.register_system_shared_memory("evil", key, 8)
        remove()
    still_serves(runtime)


@pytest.mark.parametrize(
    ("size", "offset"), [(8193, 0), (8192, 1), (1, 8192), (0, 0), (-1, 0), (16, -16), (1 << 62, 0), (1 << 40, 1 << 62)]
)
def test_a_registration_larger_than_the_object_is_refused(
    client: triton.InferenceServerClient, key: str, size: int, offset: int
) -> None:
    Path("/dev/shm", key).write_bytes(bytes(8192))
    with pytest.raises(InferenceServerException, match="bytes"):
        client.register_system_shared_memory("large", key, size, offset=offset)


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b'{"key": 5, "byte_size": 1}', b'{"key": "k", "byte_size": "1"}', b"\xff" * 50]
)
def test_a_registration_that_is_none_is_told_so(runtime: Runtime, body: bytes) -> None:
    status, answer = runtime.ask("POST", "/v2/systemsharedmemory/region/r/register", body)
    assert (status, "not a registration" in answer["error"]) == (400, True)


@pytest.mark.parametrize(("size", "offset"), [(X.nbytes, 1), (X.nbytes, 1 << 40), (X.nbytes, X.nbytes)])
def test_a_tensor_outside_its_region_is_refused(
    client: triton.InferenceServerClient, runtime: Runtime, key: str, size: int, offset: int
) -> None:
    Path("/dev/shm", key).write_bytes(bytes(X.nbytes * 2))
    client.register_system_shared_memory("r", key, X.nbytes)
    with pytest.raises(InferenceServerException, match="are asked for"):
        client.infer("toy", [shared_input("r", offset=offset)])
    output = triton.InferRequestedOutput("y")
    output.set_shared_memory("r", size, offset=offset)
    with pytest.raises(InferenceServerException, match="are asked for"):
        client.infer("toy", [shared_input("r")], outputs=[output])
    output = triton.InferRequestedOutput("y")
    output.set_shared_memory("r", ANSWER_BYTES - 1)
    with pytest.raises(InferenceServerException, match="room is for"):
        client.infer("toy", [shared_input("r")], outputs=[output])
    still_serves(runtime)


def test_an_object_that_shrinks_after_registration_costs_its_own_request_and_no_process(
    client: triton.InferenceServerClient, runtime: Runtime, key: str
) -> None:
    place = Path("/dev/shm", key)
    place.write_bytes(X.tobytes() + bytes(ANSWER_BYTES))
    client.register_system_shared_memory("r", key, X.nbytes + ANSWER_BYTES)
    front, worker = runtime.client.ping().pid, runtime.version("1").pid
    output = triton.InferRequestedOutput("y")
    output.set_shared_memory("r", ANSWER_BYTES, offset=X.nbytes)
    os.truncate(place, X.nbytes)
    with pytest.raises(InferenceServerException, match="became smaller"):
        client.infer("toy", [shared_input("r")], outputs=[output])
    assert place.stat().st_size == X.nbytes  # the answer did not make it larger again
    for left in (X.nbytes - 1, 100, 0):
        os.truncate(place, left)
        with pytest.raises(InferenceServerException, match="became smaller"):
            client.infer("toy", [shared_input("r")])
    assert (runtime.client.ping().pid, runtime.version("1").pid) == (front, worker)
    still_serves(runtime)


AS_NOBODY = """
import encodings.idna, json, os, sys, uuid  # all that is needed, while it can still be read
from http.client import HTTPConnection
os.setgid(65534); os.setuid(65534)
host, port, key, names = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
link = HTTPConnection(host, port, timeout=10)
def ask(method, path, body=None):
    link.request(method, path, json.dumps(body) if body is not None else None)
    answer = link.getresponse()
    return [answer.status, answer.read().decode()]
own = f"edgefleet-test-{uuid.uuid4().hex}"
with open("/dev/shm/" + own, "wb") as stream:
    stream.write(bytes(64))
os.chmod("/dev/shm/" + own, 0o600)
register = "/v2/systemsharedmemory/region/{}/register"
told = {
    "steal": ask("POST", register.format("s"), {"key": key, "byte_size": 16}),
    "own": ask("POST", register.format("o"), {"key": own, "byte_size": 64}),
    "listed": ask("GET", "/v2/systemsharedmemory/status"),
    "theirs": ask("GET", "/v2/systemsharedmemory/region/theirs/status"),
    "forget": ask("POST", "/v2/systemsharedmemory/region/theirs/unregister"),
}
os.unlink("/dev/shm/" + own)
print(json.dumps(told))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")
def test_another_users_memory_and_names_are_out_of_reach(
    client: triton.InferenceServerClient, runtime: Runtime, key: str
) -> None:
    place = Path("/dev/shm", key)
    place.write_bytes(bytes(64))
    place.chmod(0o600)
    client.register_system_shared_memory("theirs", key, 64)
    host, port = runtime.address
    output = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, host, str(port), key], capture_output=True, check=True, text=True, cwd="/"
    ).stdout
    told = json.loads(output)
    assert told["steal"][0] == 400
    assert "another user's" in told["steal"][1]
    assert told["own"][0] == 200
    assert [region["name"] for region in json.loads(told["listed"][1])] == ["o"]
    assert told["theirs"][0] == 400
    assert [region["name"] for region in client.get_system_shared_memory_status()] == ["theirs"]


def test_more_regions_than_allowed_are_refused(
    client: triton.InferenceServerClient, runtime: Runtime, key: str
) -> None:
    Path("/dev/shm", key).write_bytes(bytes(64))
    for number in range(64):
        client.register_system_shared_memory(f"r{number}", key, 64)
    with pytest.raises(InferenceServerException, match="too many"):
        client.register_system_shared_memory("one more", key, 64)
    assert len(client.get_system_shared_memory_status()) == 64
    client.unregister_system_shared_memory()
    assert client.get_system_shared_memory_status() == []
    still_serves(runtime)
