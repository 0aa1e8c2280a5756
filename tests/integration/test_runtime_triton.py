"""What Triton's client library and its example programs ask beside inferences, and whether the figures that they get are true."""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from support import artifacts
from support.runtimes import Runtime, running
from tritonclient.utils import InferenceServerException


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with running(tmp_path_factory.mktemp("board")) as made:
        made.install(made.add("1"))
        yield made.start()


@pytest.fixture
def client(runtime: Runtime) -> Iterator[triton.InferenceServerClient]:
    made = triton.InferenceServerClient("{}:{}".format(*runtime.address))
    yield made
    made.close()


def pictures(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).random((rows, 8, 8, 3), np.float32)


def tensor(x: np.ndarray) -> triton.InferInput:
    made = triton.InferInput("x", list(x.shape), "FP32")
    made.set_data_from_numpy(x)
    return made


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v2/models/toy/infer", "POST"),
        ("POST", "/v2/health/live", "GET, HEAD"),
        ("PUT", "/v2/models/toy/config", "GET, HEAD"),
        ("OPTIONS", "/v2/repository/index", "POST"),
        ("DELETE", "/v2/systemsharedmemory/region/r/register", "POST"),
    ],
)
def test_whoever_asks_by_the_wrong_method_is_told_the_right_one(
    runtime: Runtime, method: str, path: str, allowed: str
) -> None:
    """RFC 9110, 15.5.6: a 405 has an Allow header."""
    connection = http.client.HTTPConnection(*runtime.address, timeout=30)
    connection.request(method, path)
    response = connection.getresponse()
    assert (response.status, response.getheader("Allow")) == (405, allowed)
    response.read()
    connection.request("GET", "/v2/health/live")  # on the same connection
    response = connection.getresponse()
    assert (response.status, response.getheader("Allow")) == (200, None)
    connection.close()


def test_a_program_that_clears_both_kinds_of_regions_before_it_begins_is_served(
    client: triton.InferenceServerClient,
) -> None:
    """As all shared memory examples of Triton's do."""
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    client.unregister_cuda_shared_memory("mine")
    assert client.get_cuda_shared_memory_status() == []
    with pytest.raises(InferenceServerException, match="no CUDA shared memory is served"):
        client.register_cuda_shared_memory("mine", b"handle", 0, 64)


def test_statistics_are_true_when_counted_again(client: triton.InferenceServerClient, runtime: Runtime) -> None:
    (before,) = client.get_inference_statistics("toy")["model_stats"]
    began_ms = time.time() * 1e3
    elapsed_ns = 0
    for rows in (1, 3, 8):
        at = time.perf_counter_ns()
        answer = client.infer("toy", [tensor(pictures(rows))])
        elapsed_ns += time.perf_counter_ns() - at
        np.testing.assert_allclose(answer.as_numpy("y"), artifacts.truth(1, pictures(rows)), atol=1e-4)
    (after,) = client.get_inference_statistics("toy")["model_stats"]
    assert after["inference_count"] - before["inference_count"] == 12  # a batch of n is n inferences, and one execution
    assert after["execution_count"] - before["execution_count"] == 3
    assert began_ms - 1 <= after["last_inference"] <= time.time() * 1e3
    took = {
        part: after["inference_stats"][part]["ns"] - before["inference_stats"][part]["ns"]
        for part in after["inference_stats"]
    }
    assert 0 < took["compute_infer"] <= took["success"] <= elapsed_ns
    assert took["queue"] + took["compute_infer"] == took["success"]
    assert {"fail", "compute_input", "compute_output", "cache_hit", "cache_miss"} <= set(took)


def test_a_failed_request_is_counted_with_the_time_that_it_took(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("board")) as runtime:
        runtime.install(runtime.add("1", behaviour="poison"))
        runtime.start()
        poisoned = pictures(1)
        poisoned[0, 0, 0, 0] = 1.0
        assert runtime.infer(poisoned)[0] == 500
        (found,) = runtime.get("/v2/models/toy/stats")[1]["model_stats"]
        assert found["inference_stats"]["fail"]["count"] == 1
        assert found["inference_stats"]["fail"]["ns"] > 0
        assert found["inference_count"] == found["last_inference"] == 0


def test_tritons_asynchronous_client_infers_and_asks(runtime: Runtime) -> None:
    async def story() -> None:
        async with triton_aio.InferenceServerClient("{}:{}".format(*runtime.address)) as client:
            assert await client.is_server_ready()
            assert await client.is_model_ready("toy", "1")
            assert [m["name"] for m in await client.get_model_repository_index()] == ["toy"]
            assert (await client.get_model_config("toy"))["max_batch_size"] > 0
            for algorithm in (None, "gzip", "deflate"):
                answers = await asyncio.gather(
                    *(
                        client.infer(
                            "toy", [tensor(pictures(rows))], request_id=str(rows),
                            request_compression_algorithm=algorithm, response_compression_algorithm=algorithm,
                        )
                        for rows in (1, 2, 5)
                    )
                )  # fmt: skip
                for rows, answer in zip((1, 2, 5), answers, strict=True):
                    assert answer.get_response()["id"] == str(rows)
                    np.testing.assert_allclose(answer.as_numpy("y"), artifacts.truth(1, pictures(rows)), atol=1e-4)

    asyncio.run(story())
