"""Other servers of the same protocol: each in an environment of its own, from its hashed lock, serving the same ONNX file over gRPC.

They come from PyPI when a benchmark first asks for them (``build/peers/``); where one does not install, the table says so and goes on.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent.parent / "build" / "peers"
START_LIMIT_S = 120.0


class PeerError(Exception):
    """A peer that can't be measured, and why."""


class Peer:
    """A running server and a bare gRPC client of it.

    Args:
        name: ``kserve`` or ``mlserver``.
        content: the ONNX file.
        model: the name that it serves it as.
    """

    def __init__(self, name: str, content: bytes, model: str) -> None:
        python = _environment(name)
        self._folder = Path(tempfile.mkdtemp(prefix=f"bench-{name}-"))
        (self._folder / "model.onnx").write_bytes(content)
        port, other, metrics = (_free_port() for _ in range(3))
        self._log = (self._folder / "log").open("wb")
        self._process = subprocess.Popen(
            [python, str(HERE / f"{name}_server.py"), str(self._folder), model, str(port), str(other), str(metrics)],
            stdout=self._log, stderr=self._log, cwd=self._folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_receive_message_length", -1)])
        self._call = bare_call(self._channel)
        self._model = model

    def infer(self, picture: npt.NDArray[Any]) -> Callable[[], bytes]:
        """What sends the picture once and returns the answer, once the peer has answered rightly for the first time."""
        request = infer_request(self._model, picture)
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                self._call(request, timeout=5)
                return lambda: self._call(request, timeout=60)
            except grpc.RpcError as exc:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = (self._folder / "log").read_text(errors="replace").strip().splitlines()
                    self.stop()
                    raise PeerError(f"does not serve: {log[-1] if log else exc.details()}") from exc
                time.sleep(0.5)

    def stop(self) -> None:
        self._channel.close()
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def bare_call(channel: grpc.Channel) -> Callable[..., bytes]:
    """ModelInfer on bytes made ready beforehand; the answer stays bytes too."""
    return channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", None, None)  # type: ignore[no-any-return]


def infer_request(model: str, picture: npt.NDArray[Any]) -> bytes:
    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="UINT8", shape=list(picture.shape))
    request.raw_input_contents.append(picture.tobytes())
    return bytes(request.SerializeToString())


def answer_of(response: bytes) -> npt.NDArray[Any]:
    """The first output's values."""
    found = service_pb2.ModelInferResponse.FromString(response)
    if found.raw_output_contents:
        return np.frombuffer(found.raw_output_contents[0], np.float32)
    return np.array(found.outputs[0].contents.fp32_contents, np.float32)


def _environment(name: str) -> Path:
    """The Python of a peer's environment, made when it is missing or its lock has changed."""
    lock, folder = HERE / f"{name}.txt", ENVIRONMENTS / name
    python, stamp = folder / "bin" / "python", folder / "lock.txt"
    if stamp.exists() and stamp.read_bytes() == lock.read_bytes():
        return python
    print(f"installing {name} from PyPI into {folder} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    install: list[str] = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--require-hashes",
        "--only-binary",
        ":all:",
        "-r",
        str(lock),
    ]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        raise PeerError(f"does not install: {done.stderr.strip().splitlines()[-1]}")
    stamp.write_bytes(lock.read_bytes())
    return python


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
