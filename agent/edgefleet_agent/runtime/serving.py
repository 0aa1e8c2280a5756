"""A loaded model behind the channel: receives Run after Run, hands on outputs in shared memory. Runs confined, in the worker."""

from __future__ import annotations

import gc
import socket
import time

import numpy as np
from edgefleet_shared import golden
from edgefleet_shared.artifact import Layout, ModelConfig
from edgefleet_shared.errors import EngineError

from edgefleet_agent import confinement
from edgefleet_agent.runtime import channel, engines
from edgefleet_agent.runtime.bound import Bound
from edgefleet_agent.runtime.channel import Done, Refused, Run, Start
from edgefleet_agent.runtime.engines.port import UnservedBatchError, loadable
from edgefleet_agent.runtime.observing import Observer
from edgefleet_agent.runtime.shm import Arena, aligned
from edgefleet_agent.runtime.tensors import NUMPY, Array

WARMUP_RUNS = 2
MAX_GOLDEN_BYTES = 1 << 30


class Serving:
    """Loads the model and warms it up.

    Args:
        link: the channel to the front.
        arenas: the inputs' and the answers' memory.

    Raises:
        EdgefleetError: the engine can't load or run it.
    """

    def __init__(
        self, link: socket.socket, arenas: tuple[Arena, Arena], start: Start, config: ModelConfig, layout: Layout
    ) -> None:
        self._link = link
        inputs, answers = arenas
        self._inputs, self._answers = inputs.slots, answers.slots
        self._takes = [(spec.name, NUMPY[spec.datatype]) for spec in config.inputs]
        self._gives = [(spec.name, NUMPY[spec.datatype]) for spec in config.outputs]
        began = time.perf_counter()
        engine = engines.find(config.engine)
        self.session = engine.load(loadable(engine, layout, start.manifest), config, start.threads)
        loaded = time.perf_counter()
        sample = _sample(config, layout, start.golden_digest)
        self.session.run(sample)
        self.load_ms, self.first_ms = (loaded - began) * 1e3, (time.perf_counter() - loaded) * 1e3
        for _ in range(WARMUP_RUNS):
            self.session.run(sample)
        inputs.touch(start.touch_bytes)
        answers.touch(1)
        # The front looks at resident memory a few times a second; this bounds what a model can take in between. Allocators
        # reserve more than they touch, hence twice as much.
        self.unconfined = confinement.limit_address_space(start.memory_bytes * 2)
        self._observer = Observer(config.statistics)
        self._bound = Bound(self.session, config.outputs)
        # What is here now stays; the collector need not look at it again in the middle of a request.
        gc.collect()
        gc.freeze()

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
                unserved = isinstance(exc, UnservedBatchError)
                answer = Refused(message.number, message.slot, exc.message[: channel.MAX_WORDS], unserved)
            except MemoryError:
                answer = Refused(message.number, message.slot, "out of memory")
            self._link.send(channel.encode(answer))
            if self._observer.has_something:
                self._link.send(channel.encode(self._observer.observed()))

    def _run(self, message: Run) -> Done:
        began = time.perf_counter_ns()
        known = self._bound.compute(message)
        if known is None:
            return self._run_anew(message)
        compute_ns = time.perf_counter_ns() - began
        if self._observer.is_due():
            self._observer.look(known.inputs, known.outputs)
        return Done(message.number, message.slot, known.shapes, compute_ns)

    def _run_anew(self, message: Run) -> Done:
        slot = self._inputs[message.slot]
        inputs: dict[str, Array] = {}
        in_slot = True
        for (name, dtype), (offset, shape) in zip(self._takes, message.tensors, strict=True):
            tensor: Array = np.ndarray(shape, dtype, slot, message.base + offset)
            in_slot = in_slot and tensor.flags.aligned
            inputs[name] = tensor if tensor.flags.aligned else tensor.copy()
        began = time.perf_counter_ns()
        outputs = self.session.run(inputs)
        compute_ns = time.perf_counter_ns() - began
        if self._observer.is_due():
            self._observer.look(inputs, outputs)
        slot, at = self._answers[message.slot], 0
        targets: dict[str, Array] = {}
        for name, dtype in self._gives:
            value = outputs[name]
            if value.dtype != dtype:
                raise EngineError(f"output {name} is {value.dtype}, the artifact promises {dtype}")
            if at + value.nbytes > len(slot):
                is_batch = any(shape[:1] > (1,) for _, shape in message.tensors)
                problem = UnservedBatchError if is_batch else EngineError
                raise problem(f"the answer does not fit the {len(slot)} bytes of one request's memory")
            targets[name] = np.ndarray(value.shape, dtype, slot, at)
            np.copyto(targets[name], value)
            at = aligned(at + value.nbytes)
        if in_slot:
            self._bound.learn(message, inputs, targets)
        return Done(message.number, message.slot, [target.shape for target in targets.values()], compute_ns)


def _sample(config: ModelConfig, layout: Layout, golden_digest: str) -> dict[str, Array]:
    """An input to warm up with: zeros where the shape is known, else the first golden picture."""
    if all(n >= 0 for spec in config.inputs for n in spec.shape[1:]):
        return {s.name: np.zeros([abs(n) for n in s.shape], NUMPY[s.datatype]) for s in config.inputs}
    inputs, _ = golden.unpack(layout.read(golden_digest, limit_bytes=MAX_GOLDEN_BYTES), config.encoding)
    return {name: np.ascontiguousarray(value[:1]) for name, value in inputs.items()}
