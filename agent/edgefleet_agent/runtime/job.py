"""One request on its way: receives a parsed request, hands on its answer; exactly one of answer and failure is called."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from edgefleet_agent.runtime.protocol import InferRequest, OutputTensor, RequestError

if TYPE_CHECKING:
    from edgefleet_agent.runtime.worker_process import Lease


class Job(ABC):
    """A request until it is answered.

    Args:
        model: the model that the client asked for.
        version: the version that the client pinned, or None for the one that serves.
        lease: where the request's body lies, if a worker lent a slot for it.
    """

    __slots__ = ("arrived_ns", "attempts", "fell_back", "lease", "model", "request", "sent_ns", "version")

    def __init__(self, model: str, version: str | None, request: InferRequest, lease: Lease | None) -> None:
        self.model, self.version, self.request, self.lease = model, version, request, lease
        self.arrived_ns = time.perf_counter_ns()
        self.sent_ns = 0
        self.fell_back = False  # the serving version refused it, the standby has it
        self.attempts = 0  # how many workers died while computing it

    @abstractmethod
    def answer(self, model: str, version: str, outputs: list[OutputTensor]) -> None:
        """Hand on what ``version`` computed: all outputs of its config."""

    @abstractmethod
    def failure(self, error: RequestError) -> None:
        """Hand on why there is no answer."""
