"""``make bench-swap``: the runtime under steady load through many hot swaps, against the raw engine call in this process.

Two models with the same input, a picture of 224 x 224 x 3 bytes (150,528): *null*, which looks at one pixel, so that all time is
the server's; and *conv*, a small real convolutional network. Each version has weights of its own, so that every answer
proves which version computed it. The client is bare: a Unix socket and a request made ready beforehand.
"""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from edgefleet_agent import slots
from edgefleet_agent.runtime.control import RuntimeClient, short_path, socket_path
from edgefleet_agent.slots import Slot, Slots, SlotStatus
from edgefleet_shared import artifact, golden
from edgefleet_shared.contract import AcceptanceContract, TensorSpec
from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.fingerprint import Requirement
from frame import Row, finish, interleave, quantile
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

SIDE = 224
SWAPS = 40
ROUNDS, CALLS = 20, 100
QUIET_S = 0.6  # steady load before each swap
PICTURE = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)


def network(kind: str, seed: int) -> bytes:
    """An ONNX model that takes ``x`` UINT8 [1, 224, 224, 3] and gives ``y`` FP32 [1, 10]."""
    random = np.random.default_rng(seed)

    def weights(name: str, *shape: int) -> T:
        return nh.from_array((random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32), name)

    if kind == "null":
        constants = [nh.from_array(np.array([0, 0, 0], np.int64), "from"), nh.from_array(np.array([1, 1, 1], np.int64), "to"),
                     nh.from_array(np.array([1, 2, 3], np.int64), "axes"), weights("head", 1, 10)]  # fmt: skip
        nodes = [h.make_node("Slice", ["x", "from", "to", "axes"], ["pixels"]), h.make_node("Cast", ["pixels"], ["f"], to=T.FLOAT),
                 h.make_node("Flatten", ["f"], ["flat"]), h.make_node("MatMul", ["flat", "head"], ["y"])]  # fmt: skip
    else:
        constants = [
            weights("k1", 16, 3, 7, 7),
            weights("k2", 32, 16, 3, 3),
            weights("k3", 64, 32, 3, 3),
            weights("head", 64, 10),
        ]
        nodes = [
            h.make_node("Cast", ["x"], ["f"], to=T.FLOAT),
            h.make_node("Transpose", ["f"], ["c0"], perm=[0, 3, 1, 2]),
        ]
        for i, stride in enumerate((4, 2, 2), 1):
            nodes += [h.make_node("Conv", [f"c{i - 1}", f"k{i}"], [f"a{i}"], strides=[stride, stride], auto_pad="SAME_UPPER"),
                      h.make_node("Relu", [f"a{i}"], [f"c{i}"])]  # fmt: skip
        nodes += [h.make_node("GlobalAveragePool", ["c3"], ["pool"]), h.make_node("Flatten", ["pool"], ["flat"]),
                  h.make_node("MatMul", ["flat", "head"], ["y"])]  # fmt: skip
    graph = h.make_graph(nodes, kind, [h.make_tensor_value_info("x", T.UINT8, [1, SIDE, SIDE, 3])],
                         [h.make_tensor_value_info("y", T.FLOAT, [1, 10])], constants)  # fmt: skip
    return bytes(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9).SerializeToString())


def raw_session(content: bytes) -> onnxruntime.InferenceSession:
    """The engine alone, with the options of the runtime's adapter."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(content, sess_options=options, providers=["CPUExecutionProvider"])


@dataclass
class Model:
    digest: str
    content: bytes
    answer: np.ndarray


def build(state: Path, kind: str, version: str, seed: int) -> Model:
    """The signed artifact's unsigned twin on the board's disk, and what its model answers to the picture."""
    content = network(kind, seed)
    answer = raw_session(content).run(None, {"x": PICTURE})[0]
    contract = AcceptanceContract(kind="classification", min_agreement=0.9, latency_p95_ms=500.0, peak_memory_bytes=512 << 20,
                                  allowed_providers=("CPUExecutionProvider",), min_golden=1)  # fmt: skip
    config = artifact.ModelConfig(
        schema=artifact.SCHEMA, model=kind, version=version, device_class="bench", engine="onnxruntime", precision="fp32",
        inputs=(TensorSpec("x", "UINT8", (1, SIDE, SIDE, 3)),), outputs=(TensorSpec("y", "FP32", (1, 10)),),
        requires=Requirement(arch=platform.machine(), engine="onnxruntime"), contract=contract,
    )  # fmt: skip
    layers = [(artifact.MODEL_LAYER, content), (artifact.GOLDEN_LAYER, golden.pack({"x": PICTURE}, {"y": answer}))]
    return Model(artifact.build(slots.artifacts(state), config, layers).digest, content, answer)


class Client:
    """One kept-alive connection that sends the same prepared infer request."""

    def __init__(self, path: Path, model: str) -> None:
        tensor = {
            "name": "x",
            "datatype": "UINT8",
            "shape": list(PICTURE.shape),
            "parameters": {"binary_data_size": PICTURE.nbytes},
        }
        header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        body = header + PICTURE.tobytes()
        self._request = (
            f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: board\r\nContent-Type: application/octet-stream\r\n"
            f"Inference-Header-Content-Length: {len(header)}\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body  # fmt: skip
        self._link = socket.socket(socket.AF_UNIX)
        self._link.settimeout(60)
        with short_path(path) as address:
            self._link.connect(address)

    def infer(self) -> bytes:
        """The whole response."""
        self._link.sendall(self._request)
        received = self._link.recv(65536)
        head, _, body = received.partition(b"\r\n\r\n")
        missing = int(head.rpartition(b"Content-Length: ")[2].split(b"\r\n")[0]) - len(body)
        while missing > 0:
            piece = self._link.recv(65536)
            if not piece:
                raise ConnectionResetError("the runtime closed the connection")
            received, missing = received + piece, missing - len(piece)
        return received


def understood(response: bytes) -> tuple[str, np.ndarray] | None:
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


def overhead(kind: str) -> list[Row]:
    """The runtime's answer against the raw call, interleaved."""
    with tempfile.TemporaryDirectory() as folder:
        model = build(Path(folder), kind, "1", 1)
        runtime = Runtime(Path(folder), model)
        try:
            session = raw_session(model.content)
            client = Client(runtime.infer_socket, kind)
            times = interleave(
                {"raw": lambda: session.run(None, {"x": PICTURE}), "served": client.infer}, ROUNDS, CALLS
            )
        finally:
            runtime.stop()
    raw, served = (quantile(times[name], 0.5) * 1e3 for name in ("raw", "served"))
    goal = 0.12 if kind == "null" else None
    return [
        Row(f"{kind}: served p50, 150 KB picture, Unix socket", served, "ms", None, "raw onnxruntime call", raw),
        Row(f"{kind}: overhead over the raw call, p50", served - raw, "ms", goal, "raw onnxruntime call", raw),
        Row(f"{kind}: ratio to the raw call, p50", served / raw, "x", None, "raw onnxruntime call", 1.0),
        Row(f"{kind}: served p99", quantile(times["served"], 0.99) * 1e3, "ms", None, "raw p99", quantile(times["raw"], 0.99) * 1e3),
    ]  # fmt: skip


class Load(threading.Thread):
    """Requests without a pause. ``samples`` are (sent at, seconds, version or None); ``wrong`` counts answers that are not their
    version's, or of a version other than the one that was promised when the request was sent."""

    def __init__(self, path: Path, answers: dict[str, np.ndarray], first: str) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, float, str | None]] = []
        self.wrong = 0
        self.promised = {first}
        self.halt = threading.Event()
        self._path, self._answers = path, answers

    def run(self) -> None:
        client = Client(self._path, "conv")
        while not self.halt.is_set():
            promised = self.promised
            began = time.perf_counter()
            try:
                known = understood(client.infer())
            except OSError:
                known, client = None, Client(self._path, "conv")
            seconds = time.perf_counter() - began
            self.samples.append((began, seconds, known[0] if known else None))
            if known is not None:
                version, answer = known
                # A request that was under way while the promise changed may be answered by either.
                allowed = promised | self.promised
                self.wrong += version not in allowed or not np.allclose(
                    answer, self._answers[version].ravel(), atol=1e-4
                )


def swaps() -> list[Row]:
    """Many hot swaps under load; between them the steady state that stalls are held against."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        models = {str(n): build(state, "conv", str(n), n) for n in (1, 2, 3)}
        runtime = Runtime(state, models["1"])
        load = Load(runtime.infer_socket, {v: m.answer for v, m in models.items()}, "1")
        windows, reloads = [], []
        try:
            load.start()
            current = "1"
            for number in range(SWAPS):
                time.sleep(QUIET_S)
                new = str(number % 3 + 1) if str(number % 3 + 1) != current else str((number + 1) % 3 + 1)
                began = time.perf_counter()
                runtime.control.load(models[new].digest, "blue-green")
                load.promised = {current, new}
                runtime.control.switch(models[new].digest)
                load.promised = {new}
                runtime.control.retire(models[current].digest)
                windows.append((began, time.perf_counter()))
                current = new
                # The peer in the same run: a program that holds the engine itself stands still for as long as loading takes.
                one = time.perf_counter()
                raw_session(models[new].content).run(None, {"x": PICTURE})
                reloads.append(time.perf_counter() - one)
            time.sleep(QUIET_S)
        finally:
            load.halt.set()
            load.join(60)
            runtime.stop()
    failed = sum(version is None for _, _, version in load.samples)
    during = [s for at, s, _ in load.samples if any(a - s <= at <= b for a, b in windows)]
    steady = [s for at, s, _ in load.samples if not any(a - s <= at <= b for a, b in windows)]
    p99 = quantile(steady, 0.99)
    return [
        Row("requests sent over all swaps", len(load.samples), "count"),
        Row("swaps", len(windows), "count"),
        Row("failed requests", failed, "count", 0),
        Row("wrong-version answers", load.wrong, "count", 0),
        Row("steady p99 under load", p99 * 1e3, "ms"),
        Row("longest stall during a swap", max(during) * 1e3, "ms", None, "reload in the serving process, longest", max(reloads) * 1e3),
        Row("longest steady request", max(steady) * 1e3, "ms"),
        Row("p99 during swaps over steady p99", quantile(during, 0.99) / p99, "x", None, "steady", 1.0),
        Row("longest stall over steady p99", max(during) / p99, "x", 1.5, "longest steady request over steady p99", max(steady) / p99),
        Row("a whole swap: load, switch, retire, p50", quantile([b - a for a, b in windows], 0.5) * 1e3, "ms"),
    ]  # fmt: skip


if __name__ == "__main__":
    finish("swap", [*overhead("null"), *overhead("conv"), *swaps()])
