"""Stage 7, accept: a candidate on live requests. Receives what the serving version was asked and answered, hands on how the candidate fared.

At most one request is with the candidate at a time, and it is given one only after what serves had it: nothing waits for the candidate, no
client sees its answers, and what it can't keep up with is not compared. Not handled here: the verdict (``contract.judge_shadow``).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from statistics import median
from typing import Protocol

import numpy as np
from edgefleet_shared import answers
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.contract import AcceptanceContract, ShadowFigures
from edgefleet_shared.errors import StarvedError

from edgefleet_agent.runtime import turns
from edgefleet_agent.runtime.job import Job
from edgefleet_agent.runtime.protocol import Form, InferRequest, InputTensor, OutputTensor, RequestError
from edgefleet_agent.runtime.tensors import NUMPY, Array

RECENT = 1024  # times that the medians look back on
IN_PIECES = ("classification", "raw")  # kinds whose answers stand side by side
PIECE_VALUES = 16 * 1024  # compared at once: a millisecond's work
Placed = list[tuple[int, tuple[int, ...]]]  # offset and shape of each input in its slot


class Candidate(Protocol):
    """The version that is tried."""

    manifest: str
    config: ModelConfig
    on_computed: Callable[[int], None] | None  # told how long its engine took, in ns

    def submit(self, job: Job) -> bool:
        """Give it a job; False when it takes none now."""
        ...


class Shadow:
    """A candidate beside what serves.

    Args:
        candidate: loaded and warm; serves nobody.
    """

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self._job: Job | None = None  # the live request that is followed
        self._inputs: list[InputTensor] = []
        self._busy = False  # computing, or being compared
        self._comparing: asyncio.Task[None] | None = None
        self._compared = self._agreed = self._failed = 0
        self._partly = 0.0
        self._times_ms: deque[float] = deque(maxlen=RECENT)
        self._serving_ms: deque[float] = deque(maxlen=RECENT)

    def figures(self) -> ShadowFigures:
        """Counts and medians so far."""
        return ShadowFigures(
            manifest=self.candidate.manifest, compared=self._compared, agreed=self._agreed, failed=self._failed,
            p50_ms=median(self._times_ms) if self._times_ms else None,
            serving_p50_ms=median(self._serving_ms) if self._serving_ms else None, partly=self._partly,
        )  # fmt: skip

    def sent(self, job: Job, slot: memoryview, placed: Placed) -> None:
        """What serves has just been given a request: remember its inputs, which are in the slot until it has answered."""
        if self._busy or self._job is not None:
            return
        inputs = []
        for spec, (offset, shape) in zip(self.candidate.config.inputs, placed, strict=True):
            size = NUMPY[spec.datatype].itemsize * int(np.prod(shape, dtype=np.int64))
            try:
                data = bytes(slot[offset : offset + size])
            except MemoryError:
                return  # the next one may be smaller; whoever asked this one is not to notice
            inputs.append(InputTensor(spec.name, spec.datatype, shape, data, size))
        self._job, self._inputs = job, inputs

    def answered(self, job: Job, outputs: list[OutputTensor], compute_ns: int) -> None:
        """What serves has answered: now the candidate may try."""
        if job is not self._job:
            return
        self._job = None
        self._busy = True
        request = InferRequest(Form("", self._inputs, 0, None, True), memoryview(b""), self._inputs)
        if not self.candidate.submit(_Followed(self, job.model, request, outputs, compute_ns)):
            self._busy = False  # it is being started again, which its crash counter tells

    def compare(self, given: list[OutputTensor], wanted: list[OutputTensor], compute_ns: int) -> None:
        """The candidate has answered; ``wanted`` is what serves gave, after ``compute_ns``."""
        config = self.candidate.config
        if config.contract.kind in IN_PIECES:
            comparison: Awaitable[float] = turns.through(agree(config.contract, given, wanted))
        else:  # boxes and lines are not found piece by piece
            comparison = turns.beside(partial(alike, config, given, wanted))
        self._comparing = asyncio.get_running_loop().create_task(self._compare(comparison, compute_ns))

    async def _compare(self, comparison: Awaitable[float], compute_ns: int) -> None:
        try:
            share = await comparison
        except (MemoryError, StarvedError):
            return  # that says nothing of the candidate
        finally:
            self._busy = False
        self._compared += 1
        if share >= 1:
            self._agreed += 1
        else:
            self._partly += share
        self._serving_ms.append(compute_ns / 1e6)

    def fail(self) -> None:
        """The candidate has not answered."""
        self._busy = False
        self._failed += 1

    def lost(self, job: Job) -> None:
        """What serves died or refused: nothing to compare with."""
        if job is self._job:
            self._job = None

    def timed(self, compute_ns: int) -> None:
        """The candidate's engine took that long."""
        self._times_ms.append(compute_ns / 1e6)


class _Followed(Job):
    """A live request that was answered, for the candidate; for nobody else, which would be compared with itself."""

    is_live = False

    __slots__ = ("_compute_ns", "_shadow", "_wanted")

    def __init__(
        self, shadow: Shadow, model: str, request: InferRequest, wanted: list[OutputTensor], compute_ns: int
    ) -> None:
        super().__init__(model, shadow.candidate.config.version, request, None)
        self._shadow, self._wanted, self._compute_ns = shadow, wanted, compute_ns

    def answer(self, model: str, version: str, outputs: list[OutputTensor]) -> None:
        self._shadow.compare(outputs, self._wanted, self._compute_ns)

    def failure(self, error: RequestError) -> None:
        self._shadow.fail()


def alike(config: ModelConfig, given: list[OutputTensor], wanted: list[OutputTensor]) -> float:
    """Whether an application would read the same from what two versions gave, 1 or 0: lines, the class of each pixel; the share of boxes that both
    found. Takes its time."""
    if [(tensor.name, tensor.shape) for tensor in given] != [(tensor.name, tensor.shape) for tensor in wanted]:
        return 0.0
    outputs, references = (
        {one.name: np.frombuffer(one.data, NUMPY[one.datatype]).reshape(one.shape) for one in side}
        for side in (given, wanted)
    )
    if not all(np.isfinite(values).all() for values in outputs.values()):
        return 0.0
    reading = answers.reading_of(config.contract, config.inputs, config.outputs, config.encoding)
    if reading.kind == "detection":
        return answers.share_of_boxes(answers.found_boxes(outputs, references, reading))
    return float(answers.alike(outputs, references, reading).all())


def agree(
    contract: AcceptanceContract, given: list[OutputTensor], wanted: list[OutputTensor]
) -> Generator[None, None, bool]:
    """Whether two versions answered alike: the same class for each picture, or every value within the contract's tolerance. Lets others have
    their turn at each ``yield``."""
    others = {tensor.name: tensor for tensor in given}
    for tensor in wanted:
        other = others.get(tensor.name)
        if other is None or other.shape != tensor.shape:
            return False
        by_class = contract.kind == "classification"
        width = tensor.shape[-1] if by_class and tensor.shape else 1
        have, want = _rows(other, width), _rows(tensor, width)
        count = max(1, PIECE_VALUES // max(1, width))
        for at in range(0, len(want), count):
            if at:
                yield
            piece, expected = have[at : at + count].astype(np.float64), want[at : at + count].astype(np.float64)
            if not np.isfinite(piece).all():
                return False
            if by_class:
                alike = np.array_equal(piece.argmax(axis=-1), expected.argmax(axis=-1))
            else:
                most, relative = contract.tolerance(tensor.name)
                alike = not (np.abs(piece - expected) > most + relative * np.abs(expected)).any()
            if not alike:
                return False
    return True


def _rows(tensor: OutputTensor, width: int) -> Array:
    values = np.frombuffer(tensor.data, NUMPY[tensor.datatype])
    return values.reshape(-1, width) if values.size else values
