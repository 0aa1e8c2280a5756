"""The worker process: receives Start, then Run after Run over its channel; hands on outputs in shared memory.

Started by :mod:`worker_process` as ``python -m edgefleet_agent.runtime.worker CHANNEL_FD ARENA_FD``, one per model version. It
checks the model's bytes, confines itself, loads, warms up, then answers until its channel ends. It never outlives the front.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from edgefleet_shared.artifact import Descriptor, Layout, ModelConfig
from edgefleet_shared.errors import EdgefleetError, EngineError

from edgefleet_agent import confinement
from edgefleet_agent.runtime import channel
from edgefleet_agent.runtime.channel import Done, Failed, Ready, Refused, Run, Start

if TYPE_CHECKING:
    from edgefleet_agent.runtime.tensors import Array

WARMUP_RUNS = 2


def main() -> int:
    link = socket.socket(fileno=int(sys.argv[1]))
    arena_fd = int(sys.argv[2])
    confinement.die_with_parent()
    start = channel.decode_to_worker(link.recv(channel.MAX_MESSAGE_BYTES))
    assert isinstance(start, Start)
    try:
        config = msgspec.json.decode(start.config, type=ModelConfig)
        layout = Layout(Path(start.layout))
        layout.check(Descriptor("", start.model_digest, start.model_size))
        missing = confinement.confine(confinement.Policy(readable=(start.layout,)))
        serving = Serving(link, arena_fd, start, config, layout)
    except EdgefleetError as exc:
        link.send(channel.encode(Failed(exc.as_dict())))
        return 1
    except MemoryError:
        link.send(channel.encode(Failed(EngineError("out of memory while loading the model").as_dict())))
        return 1
    link.send(channel.encode(Ready(serving.session.providers, serving.load_ms, serving.first_ms, missing)))
    serving.loop()
    return 0


class Serving:
    """A loaded model behind the channel."""

    def __init__(self, link: socket.socket, arena_fd: int, start: Start, config: ModelConfig, layout: Layout) -> None:
        # numpy and the engine are imported behind the confinement: their code runs with no more rights than the model's.
        from edgefleet_agent.runtime import engines
        from edgefleet_agent.runtime.shm import Arena
        from edgefleet_agent.runtime.tensors import NUMPY

        self._link, self._config = link, config
        self._arena = Arena(arena_fd, start.slot_count, start.slot_bytes)
        os.close(arena_fd)
        self._dtypes = [NUMPY[spec.datatype] for spec in config.inputs]
        began = time.perf_counter()
        self.session = engines.find(config.engine).load(layout.path(start.model_digest), config, start.threads)
        loaded = time.perf_counter()
        sample = _sample(config, layout, start.golden_digest)
        self.session.run(sample)
        self.load_ms, self.first_ms = (loaded - began) * 1e3, (time.perf_counter() - loaded) * 1e3
        for _ in range(WARMUP_RUNS):
            self.session.run(sample)

    def loop(self) -> None:
        """Answer until the front closes the channel."""
        # One buffer for good: recv() would map and unmap MAX_MESSAGE_BYTES for every message of some fifty.
        buffer = memoryview(bytearray(channel.MAX_MESSAGE_BYTES))
        while length := self._link.recv_into(buffer):
            message = channel.decode_to_worker(buffer[:length])
            assert isinstance(message, Run)
            try:
                answer: Done | Refused = self._run(message)
            except EngineError as exc:
                answer = Refused(message.number, message.slot, exc.message)
            except MemoryError:
                answer = Refused(message.number, message.slot, "out of memory")
            self._link.send(channel.encode(answer))

    def _run(self, message: Run) -> Done:
        import numpy as np

        from edgefleet_agent.runtime.shm import aligned
        from edgefleet_agent.runtime.tensors import NUMPY

        slot = self._arena.slots[message.slot]
        inputs, offset = {}, 0
        for spec, dtype, shape in zip(self._config.inputs, self._dtypes, message.shapes, strict=True):
            tensor = np.ndarray(shape, dtype, buffer=slot, offset=offset)
            tensor.flags.writeable = False
            inputs[spec.name] = tensor
            offset = aligned(offset + tensor.nbytes)
        began = time.perf_counter_ns()
        outputs = self.session.run(inputs)
        compute_ns = time.perf_counter_ns() - began
        at, shapes = offset, []
        for spec in self._config.outputs:
            value = outputs[spec.name]
            if value.dtype != NUMPY[spec.datatype]:
                raise EngineError(f"output {spec.name} is {value.dtype}, the artifact promises {spec.datatype}")
            if at + value.nbytes > len(slot):
                raise EngineError(f"the answer does not fit the {len(slot)} bytes of one request's memory")
            target: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = np.ndarray(
                value.shape, value.dtype, buffer=slot, offset=at
            )
            np.copyto(target, value)
            shapes.append(value.shape)
            at = aligned(at + value.nbytes)
        return Done(message.number, message.slot, offset, shapes, compute_ns)


def _sample(config: ModelConfig, layout: Layout, golden_digest: str) -> dict[str, Array]:
    """An input to warm up with: zeros where the shape is known, else the first golden picture."""
    import numpy as np

    from edgefleet_agent.runtime.tensors import NUMPY

    if all(n >= 0 for spec in config.inputs for n in spec.shape[1:]):
        return {s.name: np.zeros([abs(n) for n in s.shape], NUMPY[s.datatype]) for s in config.inputs}
    from edgefleet_shared import golden

    inputs, _ = golden.unpack(layout.read(golden_digest, limit_bytes=1 << 30), config.encoding)
    return {name: np.ascontiguousarray(value[:1]) for name, value in inputs.items()}


if __name__ == "__main__":
    sys.exit(main())
