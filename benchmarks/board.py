"""A board for benchmarks: receives a kind of network, hands on artifacts, a running ``fleet-runtime``, bare clients and steady load.

All networks take a picture of 224 x 224 x 3 bytes (150,528): *null* looks at one pixel, so that all time is the server's; *conv* is a
small real convolutional network; *lite0* is EfficientNet-Lite0 with its trained weights in int8, a network of MobileNetV2's class. Each
version has weights of its own, so that every answer proves which version computed it. The clients are bare: a Unix socket and
a request made ready beforehand.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when the library is loaded
import onnxruntime
from edgefleet_agent import slots
from edgefleet_agent.runtime.control import RuntimeClient, short_path, socket_path
from edgefleet_agent.slots import Slot, Slots, SlotStatus
from edgefleet_shared import artifact, golden
from edgefleet_shared.contract import AcceptanceContract, TensorSpec
from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.fingerprint import Requirement
from networks import SIDE

PICTURE = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)


def raw_session(content: bytes) -> onnxruntime.InferenceSession:
    """The engine alone, with the options of the runtime's adapter."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(content, sess_options=options, providers=["CPUExecutionProvider"])


@dataclass
class Model:
    """An artifact on the board's disk: its digest, its ONNX file, what it answers to the picture."""

    digest: str
    content: bytes
    answer: npt.NDArray[Any]


def build(
    state: Path,
    model: str,
    version: str,
    content: bytes,
    *,
    answer: npt.NDArray[Any] | None = None,
    peak_memory_bytes: int = 1 << 30,
) -> Model:
    """The signed artifact's unsigned twin on the board's disk.

    Args:
        answer: for a network that can't be asked; else it is.
    """
    if answer is None:
        answer = raw_session(content).run(None, {"x": PICTURE})[0]
    contract = AcceptanceContract(kind="classification", min_agreement=0.9, latency_p95_ms=500.0, peak_memory_bytes=peak_memory_bytes,
                                  allowed_providers=("CPUExecutionProvider",), min_golden=1)  # fmt: skip
    config = artifact.ModelConfig(
        schema=artifact.SCHEMA, model=model, version=version, device_class="bench", engine="onnxruntime", precision="any",
        inputs=(TensorSpec("x", "UINT8", (1, SIDE, SIDE, 3)),), outputs=(TensorSpec("y", "FP32", answer.shape),),
        requires=Requirement(arch=platform.machine(), engine="onnxruntime"), contract=contract,
    )  # fmt: skip
    layers = [(artifact.MODEL_LAYER, content), (artifact.GOLDEN_LAYER, golden.pack({"x": PICTURE}, {"y": answer}))]
    return Model(artifact.build(slots.artifacts(state), config, layers).digest, content, answer)


class Client:
    """One kept-alive connection that sends the same prepared infer request.

    Args:
        region: the name of a registered shared memory region that holds the picture; None sends it.
    """

    def __init__(self, path: Path, model: str, region: str | None = None) -> None:
        if region is None:
            parameters: dict[str, Any] = {"binary_data_size": PICTURE.nbytes}
        else:
            parameters = {"shared_memory_region": region, "shared_memory_byte_size": PICTURE.nbytes}
        tensor = {"name": "x", "datatype": "UINT8", "shape": list(PICTURE.shape), "parameters": parameters}
        header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        body = header + (PICTURE.tobytes() if region is None else b"")
        self._request = self.prepared(f"/v2/models/{model}/infer", body, len(header))
        self._link = socket.socket(socket.AF_UNIX)
        self._link.settimeout(120)
        with short_path(path) as address:
            self._link.connect(address)

    @staticmethod
    def prepared(path: str, body: bytes, header_length: int) -> bytes:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: board\r\nContent-Type: application/octet-stream\r\n"
            f"Inference-Header-Content-Length: {header_length}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def register(self, name: str, key: str) -> None:
        """Tell the runtime about a POSIX shared memory object that holds the picture."""
        body = json.dumps({"key": key, "byte_size": PICTURE.nbytes}).encode()
        answer = self.ask(self.prepared(f"/v2/systemsharedmemory/region/{name}/register", body, 0))
        assert answer.startswith(b"HTTP/1.1 200"), answer

    def infer(self) -> bytes:
        """The whole response."""
        return self.ask(self._request)

    def ask(self, request: bytes) -> bytes:
        self._link.sendall(request)
        received = self._link.recv(65536)
        head, _, body = received.partition(b"\r\n\r\n")
        missing = int(head.rpartition(b"Content-Length: ")[2].split(b"\r\n")[0]) - len(body)
        while missing > 0:
            piece = self._link.recv(65536)
            if not piece:
                raise ConnectionResetError("the runtime closed the connection")
            received, missing = received + piece, missing - len(piece)
        return received


def understood(response: bytes) -> tuple[str, npt.NDArray[Any]] | None:
    """(version, answer), or None when the request failed."""
    head, _, body = response.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        return None
    length = int(head.partition(b"Inference-Header-Content-Length: ")[2].split(b"\r\n")[0])
    return json.loads(body[:length])["model_version"], np.frombuffer(body[length:], np.float32)


class Runtime:
    """A ``fleet-runtime`` process that serves one artifact."""

    def __init__(self, state: Path, model: Model) -> None:
        slots.write(state, Slots(active=Slot(model.digest, "bench", "1", SlotStatus.GOOD)))
        self.state, self.control = state, RuntimeClient(socket_path(state))
        self.infer_socket = state / "run" / "infer.sock"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edgefleet_agent.runtime.app", "--state", str(state), "--http", "off"],
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while not self._serves():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise SystemExit("the runtime did not start")
            time.sleep(0.05)

    def _serves(self) -> bool:
        try:
            return any(v.serving and v.state == "ready" for v in self.control.status().versions)
        except EdgefleetError:
            return False

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)


@dataclass
class Sample:
    """One request: when it was sent (:func:`time.perf_counter`), how long its answer took, and which version gave it.

    ``version`` is None when it failed, and "wrong" when the numbers are not those of the version that it names.
    """

    sent: float
    seconds: float
    version: str | None


class Load:
    """Requests without a pause, from a process of its own, so that nothing that the benchmark does meanwhile is felt in them."""

    def __init__(self, path: Path, model: str, answers: dict[str, npt.NDArray[Any]]) -> None:
        here = multiprocessing.get_context("spawn")
        self._halt, self._samples = here.Event(), here.SimpleQueue()
        begun = here.Event()
        self._process = here.Process(
            target=_send, args=(path, model, answers, begun, self._halt, self._samples), daemon=True
        )
        self._process.start()
        begun.wait(60)

    def stop(self) -> list[Sample]:
        self._halt.set()
        samples = [Sample(*row) for row in self._samples.get()]
        self._process.join(60)
        return samples


def _send(path: Path, model: str, answers: dict[str, npt.NDArray[Any]], begun: Any, halt: Any, result: Any) -> None:
    rows: list[tuple[float, float, str | None]] = []
    client = Client(path, model)
    for _ in range(50):
        client.infer()
    begun.set()
    while not halt.is_set():
        sent = time.perf_counter()
        try:
            response = client.infer()
        except OSError:
            rows.append((sent, time.perf_counter() - sent, None))
            client = Client(path, model)
            continue
        seconds = time.perf_counter() - sent
        known = understood(response)
        version = None if known is None else known[0]
        if known is not None and not np.allclose(known[1], answers[known[0]].ravel(), atol=1e-4):
            version = "wrong"
        rows.append((sent, seconds, version))
    result.put(rows)


@dataclass
class Promise:
    """From ``since`` on, requests are answered by one of ``versions``."""

    since: float
    versions: frozenset[str]


def wrong_answers(samples: list[Sample], promises: list[Promise]) -> int:
    """How many answers are not their version's, or of a version that nobody had promised at any moment of the request."""
    wrong = 0
    for sample in samples:
        if sample.version is None:
            continue
        end = sample.sent + sample.seconds
        ends = [p.since for p in promises[1:]] + [float("inf")]
        allowed = frozenset().union(
            *(p.versions for p, until in zip(promises, ends, strict=True) if p.since <= end and until >= sample.sent)
        )
        wrong += sample.version not in allowed
    return wrong
