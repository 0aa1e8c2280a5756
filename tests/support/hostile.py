"""An engine that does what no model may, in a real worker, when a picture asks it to; and how a board gets it.

It answers as the tests' classifier does. A picture whose first value is exactly 1.0 makes it do its deed first, with the rights that a
worker has: behind the confinement, and with the worker's own channel at hand.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from edgefleet_agent.runtime import channel
from edgefleet_agent.runtime.channel import Done, Observed, Ready
from edgefleet_agent.runtime.tensors import Array
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.errors import EngineError

from support import artifacts

TESTS = Path(__file__).resolve().parents[1]

# observe   says for ever what a request was like
# start     says for ever that it is loaded
# misplace  says that its answer is in another request's slot
# misshape  says that its answer has less than nothing on two axes
# mistime   says that it computed for longer than the universe is old
# linger    takes three seconds
# hang up   closes its channel, and stays
# leak      keeps some memory, of which it never has enough
# leave     ends soon after it was loaded
# print     prints what looks like the runtime's own log, more than anybody wants to read, and aborts
# give up   prints why and aborts, when it is loaded
# complain  has an error longer than any message
# refuse    has one when it is loaded
Deed = Literal[
    "observe", "start", "misplace", "misshape", "mistime", "linger", "hang up", "leak", "leave", "print", "give up",
    "complain", "refuse",
]  # fmt: skip
LEAK_BYTES = 16 << 20
LEAKER_LOADS_S = 3.0
LEAVES_AFTER_S = 4.0
_LEAKED: list[bytearray] = []


class Does(msgspec.Struct, frozen=True):
    """The model: whose classifier it is, and its deed."""

    seed: int
    deed: Deed


class HostileEngine:
    """Registered under the name ``hostile`` by :func:`install`."""

    name = "hostile"

    def available(self) -> str | None:
        return "1.0"

    def missing(self) -> str:
        return ""

    def load_library(self) -> None:
        """There is none."""

    def load(self, path: Path, config: ModelConfig, threads: int) -> HostileSession:
        does = msgspec.json.decode(path.read_bytes(), type=Does)
        if does.deed == "give up":
            os.write(2, b"a word before\n\x1b[2Jno such device\n")
            os.abort()
        if does.deed == "leak":
            time.sleep(LEAKER_LOADS_S)  # as long as a large model takes
        if does.deed == "leave":
            threading.Timer(LEAVES_AFTER_S, os._exit, (0,)).start()
            time.sleep(LEAVES_AFTER_S / 2)
        if does.deed == "refuse":
            _complain(config, {})
        return HostileSession(does, config)


class HostileSession:
    providers = ("CPUExecutionProvider",)

    def __init__(self, does: Does, config: ModelConfig) -> None:
        self._does, self._config = does, config

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        if inputs["x"].ravel()[0] == 1.0:
            caller: Any = sys._getframe(1)
            _DEEDS[self._does.deed](self._config, caller.f_locals)
        return {"y": artifacts.truth(self._does.seed, inputs["x"]).astype(np.float32)}


def _link() -> socket.socket:
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                return socket.socket(fileno=os.dup(fd))
    raise AssertionError("a worker has a channel")


def _observe(config: ModelConfig, _caller: dict[str, Any]) -> None:
    normal = config.statistics
    assert normal is not None
    tensors = (*normal.inputs, *normal.outputs)
    said = [([0] * len(part.shares), 0, None) for tensor in tensors for part in (tensor, *tensor.channels)]
    _for_ever(channel.encode(Observed(said, -1, 0)))


def _start(_config: ModelConfig, _caller: dict[str, Any]) -> None:
    _for_ever(channel.encode(Ready((), 0.0, 0.0, ())))


def _for_ever(message: bytes) -> None:
    link = _link()
    while True:
        link.send(message)


def _say_done(
    caller: dict[str, Any], *, slots: int = 0, shape: tuple[int, ...] = (1, artifacts.CLASSES), compute_ns: int = 1
) -> None:
    asked = caller["message"]
    _link().send(channel.encode(Done(asked.number, (asked.slot + slots) % 6, [shape], compute_ns)))
    time.sleep(60)


def _hang_up(_config: ModelConfig, _caller: dict[str, Any]) -> None:
    _link().shutdown(socket.SHUT_RDWR)
    time.sleep(60)


def _print(_config: ModelConfig, _caller: dict[str, Any]) -> None:
    for said in (b'\n{"event":"forged"}\n', b"\xff\x00\x1b[2J" * (50 << 10), b"\nits last words\n"):
        left = said
        while left:
            left = left[os.write(1, left) :]
    os.abort()


def _complain(_config: ModelConfig, _caller: dict[str, Any]) -> None:
    raise EngineError("there is much that is wrong: " + "x" * 300_000)


_DEEDS: dict[str, Callable[[ModelConfig, dict[str, Any]], None]] = {
    "observe": _observe,
    "start": _start,
    "misplace": lambda _config, caller: _say_done(caller, slots=1),
    "misshape": lambda _config, caller: _say_done(caller, shape=(-1, -artifacts.CLASSES)),
    "mistime": lambda _config, caller: _say_done(caller, compute_ns=2**64 - 1),
    "hang up": _hang_up,
    "leak": lambda _config, _caller: _LEAKED.append(bytearray(b"x") * LEAK_BYTES),
    "print": _print,
    "complain": _complain,
    "linger": lambda _config, _caller: time.sleep(3.2),
}


def model(seed: int, deed: Deed) -> bytes:
    return msgspec.json.encode(Does(seed, deed))


def install(folder: Path) -> dict[str, str]:
    """Put the engine's distribution into ``folder``; the environment of a program that is to have it."""
    info = folder / "edgefleet_test_hostile-1.dist-info"
    info.mkdir(parents=True)
    (info / "entry_points.txt").write_text("[edgefleet.engines]\nhostile = support.hostile:HostileEngine\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgefleet-test-hostile\nVersion: 1\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(TESTS), os.environ.get("PYTHONPATH", "")])}
