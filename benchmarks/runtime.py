"""``make bench-runtime``: what the runtime adds to the raw engine call, its peers in the same run, and a thousand swaps under load.

The raw call is made in this process, where the picture lies; a served answer comes from another process. All are timed round by round
in turn. Beside the p50 of a hundred raw calls in a row stands the p50 of raw calls that alternate with served ones: a
processor that does something else in between is slower at either, and so is every application that looks at a picture now and then.
Beside ours stands the floor: two processes that only pass the picture on (:mod:`bare`).
All of it is measured as the machine is, and by turns with processors that don't sleep (the power profile ``max_wake_us: 0``), which needs
root: a request wakes three processes one after the other.
``--swaps 40`` makes the swaps' part short, ``--no-peers`` leaves KServe and MLServer out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import bare
import grpc
import networks
import peers
import swap
from board import PICTURE, Client, Model, Runtime, build, raw_session
from edgefleet_agent import power_profile
from edgefleet_shared.artifact import PowerProfile
from edgefleet_shared.errors import EnvironmentProblem
from frame import Row, finish, interleave, quantile

ROUNDS, CALLS = 20, 100
GOALS_MS = {"unix": 0.12, "shm": 0.08}
BLOCK = 4  # rounds in one state of the machine, before the other has its turn
AS_IT_IS, AWAKE = "", ", processors kept awake"
BETWEEN = "raw in between"
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


class Times(NamedTuple):
    """p50 of every way, and of raw calls that alternate with served ones; ms."""

    p50: dict[str, float]
    alternating: float


@contextmanager
def kept_awake(folder: Path) -> Iterator[None]:
    """Processors that don't sleep meanwhile.

    Raises:
        EnvironmentProblem: this kernel can't, or may not by this user.
    """
    kept = folder / "before.json"
    try:
        power_profile.apply(PowerProfile(max_wake_us=0), kept=kept)
        yield
    finally:
        power_profile.apply(PowerProfile(), kept=kept)


def measure(
    kind: str, content: bytes, rounds: int, calls: int, *, with_peers: bool
) -> tuple[dict[str, Times], dict[str, str]]:
    """(times by what rows call that state of the machine, why a peer or a state is missing)."""
    with tempfile.TemporaryDirectory() as folder:
        states: dict[str, Callable[[], AbstractContextManager[None]]] = {AS_IT_IS: nullcontext}
        ways = Ways(Path(folder), kind, content, with_peers=with_peers)
        try:
            with kept_awake(Path(folder)):
                states[AWAKE] = lambda: kept_awake(Path(folder))
        except EnvironmentProblem as exc:
            ways.missing[AWAKE.strip(", ")] = str(exc)
        times: dict[str, dict[str, list[float]]] = {state: {} for state in states}
        try:
            for _ in range(rounds // BLOCK):
                for state, begin in states.items():
                    with begin():
                        found = interleave(ways.calls, BLOCK, calls)
                        found[BETWEEN] = interleave({n: ways.calls[n] for n in ("raw", "unix")}, BLOCK * calls // 2, 1)[
                            "raw"
                        ]
                    for name, taken in found.items():
                        times[state].setdefault(name, []).extend(taken)
        finally:
            ways.close()
    p50 = {state: {name: quantile(t, 0.5) * 1e3 for name, t in found.items()} for state, found in times.items()}
    return {state: Times(found, found.pop(BETWEEN)) for state, found in p50.items()}, ways.missing


def null_rows(*, with_peers: bool) -> list[Row]:
    """The overhead, on a network that does nothing."""
    found, missing = measure("null", networks.null(1), ROUNDS, CALLS, with_peers=with_peers)
    for name, why in missing.items():
        print(f"{name} was not measured: {why}")
    return [row for state, times in found.items() for row in _null_rows(times, state)]


def _null_rows(times: Times, state: str) -> list[Row]:
    p50, alternating = times
    raw = p50["raw"]
    over = {name: value - raw for name, value in p50.items()}
    rows = [
        Row(f"overhead over the raw call, p50, 150 KB picture, {SHOWN[way]}{state}", over[way], "ms", GOALS_MS.get(way), "raw onnxruntime call", raw)
        for way in ("unix", "shm", "grpc")
    ]  # fmt: skip
    rows.append(Row(f"overhead of two processes that only pass it on, p50{state}", over["bare"], "ms"))
    rows.append(
        Row(
            f"overhead over a raw call made in between, p50, Unix socket{state}",
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
                what = f"overhead over {name} gRPC's, {shown}{state}"
                rows.append(Row(what, over[way] / over[name], "x", goal, f"{name} gRPC, ms", over[name]))
    return rows


def real_rows(*, with_peers: bool) -> list[Row]:
    """The ratio to the raw call, on a real network."""
    found, _ = measure("lite0", networks.lite0(), 8, 25, with_peers=with_peers)
    return [row for state, times in found.items() for row in _real_rows(times.p50, state)]


def _real_rows(p50: dict[str, float], state: str) -> list[Row]:
    best = {name: p50[name] / p50["raw"] for name in ("kserve", "mlserver") if name in p50}
    rows = []
    for way in ("unix", "shm", "grpc"):
        rows.append(Row(f"EfficientNet-Lite0 int8, ratio to the raw call, p50, {SHOWN[way]}{state}", p50[way] / p50["raw"], "x", 1.08 if way != "grpc" else None,
                        "kserve gRPC" if "kserve" in best else None, best.get("kserve")))  # fmt: skip
    rows.append(Row(f"EfficientNet-Lite0 int8, raw call, p50{state}", p50["raw"], "ms"))
    if "mlserver" in best:
        rows.append(
            Row(f"EfficientNet-Lite0 int8, ratio to the raw call, p50, mlserver gRPC{state}", best["mlserver"], "x")
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    chosen = parser.parse_args()
    finish(
        "runtime", [*null_rows(with_peers=chosen.peers), *real_rows(with_peers=chosen.peers), *swap.rows(chosen.swaps)]
    )
