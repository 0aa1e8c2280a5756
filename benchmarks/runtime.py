"""``make bench-runtime``: what the runtime adds to the raw engine call, its peers in the same run, and a thousand swaps under load.

The raw call is made in this process, where the picture lies; a served answer comes from another process. All are timed round by round
in turn. Beside the p50 of a hundred raw calls in a row stands the p50 of raw calls that alternate with served ones: a
processor that does something else in between is slower at either, and so is every application that looks at a picture now and then.
Beside ours stands the floor: two processes that only pass the picture on (:mod:`bare`).
``--swaps 40`` makes the swaps' part short, ``--no-peers`` leaves KServe and MLServer out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import bare
import grpc
import networks
import peers
import swap
from board import PICTURE, Client, Model, Runtime, build, raw_session
from frame import Row, finish, interleave, quantile

ROUNDS, CALLS = 20, 100
GOALS_MS = {"unix": 0.12, "shm": 0.08}
SHOWN = {"unix": "Unix socket", "shm": "shared memory", "grpc": "gRPC"}


class Ways:
    """One model behind every way to it.

    ``calls`` maps each way to what asks once; ``missing`` says which peer is not there, and why.
    """

    def __init__(self, folder: Path, kind: str, content: bytes, *, with_peers: bool) -> None:
        self._kind, self._folder = kind, folder
        self.model: Model = build(folder, kind, "1", content)
        self.calls: dict[str, Callable[[], object]] = {}
        self.missing: dict[str, str] = {}
        self._closing: list[Callable[[], object]] = []
        try:
            self._open(content, with_peers)
        except BaseException:
            self.close()
            raise

    def _open(self, content: bytes, with_peers: bool) -> None:
        runtime = Runtime(self._folder, self.model)
        self._closing.append(runtime.stop)
        session = raw_session(content)
        self.calls["raw"] = lambda: session.run(None, {"x": PICTURE})
        floor = bare.Bare(content)
        self._closing.append(floor.stop)
        self.calls["bare"] = floor.infer
        self.calls["unix"] = Client(runtime.infer_socket, self._kind).infer
        self.calls["shm"] = self._shared_memory(runtime)
        self.calls["grpc"] = self._grpc()
        for name in ("kserve", "mlserver") if with_peers else ():
            try:
                peer = peers.Peer(name, content, self._kind)
                self._closing.append(peer.stop)
                self.calls[name] = peer.infer(PICTURE)
            except peers.PeerError as exc:
                self.missing[name] = str(exc)

    def _shared_memory(self, runtime: Runtime) -> Callable[[], object]:
        key = f"edgefleet-bench-{os.getpid()}-{self._kind}"
        place = Path("/dev/shm", key)
        place.write_bytes(PICTURE.tobytes())
        self._closing.append(lambda: place.unlink(missing_ok=True))
        client = Client(runtime.infer_socket, self._kind, region="picture")
        client.register("picture", key)
        return client.infer

    def _grpc(self) -> Callable[[], object]:
        process = subprocess.Popen(
            [sys.executable, "-m", "edgefleet_agent.runtime.grpc_gateway", "--state", str(self._folder), "--listen", "127.0.0.1:0"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._closing += [process.wait, process.terminate]  # closed from the end
        assert process.stdout is not None
        channel = grpc.insecure_channel(process.stdout.readline().removeprefix("listening at ").strip())
        self._closing.append(channel.close)
        call, request = peers.bare_call(channel), peers.infer_request(self._kind, PICTURE)
        return lambda: call(request, timeout=60)

    def close(self) -> None:
        for close in reversed(self._closing):
            close()


def measure(
    kind: str, content: bytes, rounds: int, calls: int, *, with_peers: bool
) -> tuple[dict[str, float], float, dict[str, str]]:
    """(p50 of every way, p50 of raw calls that alternate with served ones, why a peer is missing), ms."""
    with tempfile.TemporaryDirectory() as folder:
        ways = Ways(Path(folder), kind, content, with_peers=with_peers)
        try:
            times = interleave(ways.calls, rounds, calls)
            alternating = interleave({name: ways.calls[name] for name in ("raw", "unix")}, rounds * calls // 2, 1)
        finally:
            ways.close()
    return (
        {name: quantile(t, 0.5) * 1e3 for name, t in times.items()},
        quantile(alternating["raw"], 0.5) * 1e3,
        ways.missing,
    )


def null_rows(*, with_peers: bool) -> list[Row]:
    """The overhead, on a network that does nothing."""
    p50, alternating, missing = measure("null", networks.null(1), ROUNDS, CALLS, with_peers=with_peers)
    raw = p50["raw"]
    over = {name: value - raw for name, value in p50.items()}
    rows = [
        Row(f"overhead over the raw call, p50, 150 KB picture, {SHOWN[way]}", over[way], "ms", GOALS_MS.get(way), "raw onnxruntime call", raw)
        for way in ("unix", "shm", "grpc")
    ]  # fmt: skip
    rows.append(Row("overhead of two processes that only pass it on, p50", over["bare"], "ms"))
    rows.append(
        Row(
            "overhead over a raw call made in between, p50, Unix socket",
            p50["unix"] - alternating,
            "ms",
            None,
            "that raw call",
            alternating,
        )
    )
    for name, share in (("kserve", 0.1), ("mlserver", 0.02)):
        if name in over:
            for way, shown, goal in (
                ("unix", "Unix socket", share),
                ("shm", "shared memory", share),
                ("grpc", "gRPC", None),
            ):
                what = f"overhead over {name} gRPC's, {shown}"
                rows.append(Row(what, over[way] / over[name], "x", goal, f"{name} gRPC, ms", over[name]))
    for name, why in missing.items():
        print(f"{name} gRPC was not measured: {why}")
    return rows


def real_rows(*, with_peers: bool) -> list[Row]:
    """The ratio to the raw call, on a real network."""
    p50, _, _ = measure("lite0", networks.lite0(), 8, 25, with_peers=with_peers)
    best = {name: p50[name] / p50["raw"] for name in ("kserve", "mlserver") if name in p50}
    rows = []
    for way in ("unix", "shm", "grpc"):
        rows.append(Row(f"EfficientNet-Lite0 int8, ratio to the raw call, p50, {SHOWN[way]}", p50[way] / p50["raw"], "x", 1.08 if way != "grpc" else None,
                        "kserve gRPC" if "kserve" in best else None, best.get("kserve")))  # fmt: skip
    rows.append(Row("EfficientNet-Lite0 int8, raw call, p50", p50["raw"], "ms"))
    if "mlserver" in best:
        rows.append(Row("EfficientNet-Lite0 int8, ratio to the raw call, p50, mlserver gRPC", best["mlserver"], "x"))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    chosen = parser.parse_args()
    finish(
        "runtime", [*null_rows(with_peers=chosen.peers), *real_rows(with_peers=chosen.peers), *swap.rows(chosen.swaps)]
    )
