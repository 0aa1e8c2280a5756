"""One request on its way, and the slot that its body came into: receives a parsed request, hands on its answer; exactly one of answer and failure
is called."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Protocol

from edgefleet_agent.runtime.protocol import InferRequest, OutputTensor, RequestError

NO_MEMORY = "the runtime has no memory for this just now"  # why there is no answer, with status 503


class Lender(Protocol):
    """Whose slots are lent."""

    def give_back(self, index: int) -> None: ...


class Lease:
    """A slot's input memory, lent to a request whose body is still coming.

    ``view`` is where the body goes, ``data`` where in the slot that is which follows its header. The request that was read there
    takes the slot over with :meth:`.WorkerProcess.submit`; whoever can't use it releases it. ``job`` is that request, if it is known
    already.
    """

    __slots__ = ("data", "held", "index", "job", "owner", "view")

    def __init__(self, owner: Lender, index: int, data: int, view: memoryview) -> None:
        self.owner, self.index, self.data, self.view = owner, index, data, view
        self.held = True
        self.job: Job | None = None

    def take_back(self, process: Lender, index: int) -> bool:
        """Hold the slot again that :meth:`.WorkerProcess.submit` took over, if it is this one."""
        self.held = self.owner is process and self.index == index
        return self.held

    def take_job(self) -> Job | None:
        """The request, once: it knows its lease, so a lease that went on knowing it would be the collector's to find."""
        job, self.job = self.job, None
        return job

    def release(self) -> None:
        self.job = None
        if self.held:
            self.held = False
            self.owner.give_back(self.index)


class Job(ABC):
    """A request until it is answered.

    Args:
        model: the model that the client asked for.
        version: the version that the client pinned, or None for the one that serves.
        lease: where the request's body lies, if a worker lent a slot for it.
    """

    is_live = True  # a client waits for it; what none waits for is given up with its worker

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
