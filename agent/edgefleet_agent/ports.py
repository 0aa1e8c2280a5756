"""What the agent needs of the world around it, as ports. app.py fills them with the real adapters, a simulation with others.

The other two ports have modules of their own: the way to the controller (:class:`edgefleet_agent.transport.Uplink`) and the disk
(:class:`edgefleet_shared.files.FileSystem`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from edgefleet_shared.assignment import Admission, Assignment
from edgefleet_shared.clock import Clock
from edgefleet_shared.contract import AcceptanceReport
from edgefleet_shared.files import FileSystem
from edgefleet_shared.messages import SignedResult

from edgefleet_agent.runtime.control import Loaded, Retired, Shadowing, StatusReport, SwapMode, Switched
from edgefleet_agent.transport import Uplink
from edgefleet_agent.verify import AdmitRequest, Checked


class BuildOrder(NamedTuple):
    """What building a plan needs to know: what the plan at hand was made by (empty: there is none), where pieces of a new one go, who is
    told how far it is (what is done, so many of so many steps), and when it is not wanted any more."""

    have: str
    take: Callable[[bytes], None]
    tell: Callable[[str, int, int], None]
    stop: threading.Event


class BuildReport(NamedTuple):
    """What came of it. ``key`` is what the plan was made by, ``anew`` that it was given away in pieces just now; ``reason`` why there is
    none, ``out_of_time`` that it took too long; ``unconfined`` what this kernel could not enforce."""

    key: str = ""
    anew: bool = False
    reason: str = ""
    out_of_time: bool = False
    unconfined: tuple[str, ...] = ()


class Examiner(Protocol):
    """Stages 6 and 7: questions about hostile bytes, each asked of a fresh sandboxed child.

    Each raises EnvironmentProblem when the board could not do its part: no child could be started, or it ended without an answer.
    """

    def admit(self, request: AdmitRequest) -> Admission:
        """May this assignment be followed? Raises Refusal, Incomplete."""
        ...

    def check(self, state: Path, assignment: Assignment) -> Checked:
        """Is what lies on the disk to the byte what was signed? Raises Refusal."""
        ...

    def build(self, state: Path, manifest: str, order: BuildOrder) -> BuildReport:
        """Make the plan of a candidate whose engine needs one on this board."""
        ...

    def accept(self, state: Path, manifest: str, threads: int) -> AcceptanceReport:
        """What does the candidate do on this board?"""
        ...


class ModelServer(Protocol):
    """Stage 8: the runtime, as :class:`edgefleet_agent.runtime.control.RuntimeClient` speaks to it. Each raises EdgefleetError."""

    def load(self, manifest: str, mode: SwapMode = "auto", timeout_s: float = 180.0) -> Loaded: ...

    def switch(self, manifest: str, timeout_s: float = 180.0) -> Switched: ...

    def shadow(self, manifest: str) -> Shadowing: ...

    def retire(self, manifest: str, timeout_s: float = 60.0) -> Retired: ...

    def status(self) -> StatusReport: ...


class Signer(Protocol):
    """Stage 9: the board's own key."""

    def sign(self, payload: bytes) -> SignedResult:
        """The payload in an envelope. Raises EnvironmentProblem when the board could not do its part."""
        ...


class Spawn(Protocol):
    """A thread of a name that does work beside the loop."""

    def __call__(self, name: str, work: Callable[[], None]) -> None:
        """Raises EnvironmentProblem when the board has no room for one: then the work is not done."""
        ...


class Ports(NamedTuple):
    """Everything that the loop works with. ``spawn`` does work beside it; what comes of it arrives in the inbox."""

    uplink: Uplink
    runtime: ModelServer
    examiner: Examiner
    signer: Signer
    clock: Clock
    files: FileSystem
    spawn: Spawn
