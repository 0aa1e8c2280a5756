"""One request on its way: receives a parsed request and where its answer goes; exactly one of answer and failure is called."""

from __future__ import annotations

import time
from collections.abc import Callable

from edgefleet_agent.runtime.protocol import InferRequest, OutputTensor, RequestError

# answer(model, version, outputs) and failure(error)
Answer = Callable[[str, str, list[OutputTensor]], None]
Failure = Callable[[RequestError], None]


class Job:
    """A request until it is answered.

    Args:
        model: the model that the client asked for.
        version: the version that the client pinned, or None for the one that serves.
    """

    __slots__ = ("answer", "arrived_ns", "attempts", "failure", "fell_back", "model", "request", "sent_ns", "version")

    def __init__(
        self, model: str, version: str | None, request: InferRequest, answer: Answer, failure: Failure
    ) -> None:
        self.model, self.version, self.request = model, version, request
        self.answer, self.failure = answer, failure
        self.arrived_ns = time.perf_counter_ns()
        self.sent_ns = 0
        self.fell_back = False  # the serving version refused it, the standby has it
        self.attempts = 0  # how many workers died while computing it
