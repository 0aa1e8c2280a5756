"""A board in memory: the real agent on a disk that can be cut, with a runtime and a controller that are simulated.

Everything between the inbox and the disk is the agent's own code, the trust checks and the check of every byte included. Simulated
are the wire (retained messages come at once, wanted chunks too), the inference (a model is as good as the story says), the runtime
(it serves what it can read and verify, as the real one does) and the threads (work is done at once, so a run is deterministic).
"""

from __future__ import annotations

import base64
import functools
import math
import platform
import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from chaos.depot import CLASS, DEVICE, Depot
from edgefleet_agent import journal, plans, settings, slots, verify, verify_child
from edgefleet_agent.health import REGRESSION_CRASHES
from edgefleet_agent.inbox import AdmissionDone, Item, Measured
from edgefleet_agent.ports import BuildOrder, BuildReport, Ports
from edgefleet_agent.runner import Runner
from edgefleet_agent.runtime.control import Loaded, Retired, Shadowing, StatusReport, Switched, VersionStatus
from edgefleet_agent.settings import Settings
from edgefleet_agent.slots import SlotStatus
from edgefleet_agent.transport import Acked, Chunk, Desired, MetadataFile, Up
from edgefleet_agent.verify import AdmitRequest, Checked, Refusal
from edgefleet_shared import results, trust
from edgefleet_shared.artifact import Layout, digest_of
from edgefleet_shared.assignment import Admission, Assignment, Floors, Subject
from edgefleet_shared.contract import AcceptanceReport, Verdict
from edgefleet_shared.errors import ArtifactError, EdgefleetError, EnvironmentProblem, NotFoundError
from edgefleet_shared.fingerprint import Fingerprint
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import (
    Ack,
    AgentReport,
    Envelope,
    EnvelopeSignature,
    Event,
    Health,
    Refused,
    Reported,
    SignedResult,
    Want,
    decode,
)
from edgefleet_shared.outcomes import Outcome
from edgefleet_shared.results import PAYLOAD_TYPE
from support.disk import MemoryDisk, Tree

# A folder that the machine itself does not have: what goes past the port fails.
STATE = Path("/board-in-memory/state")
KEY, OTHER_KEY = "engine 1", "engine 2"  # what plans depend on, before and after an upgrade of the engine that builds
BOARD = Fingerprint(
    arch=platform.machine(), cpu_features=(), engines={"onnxruntime": "1", "building": "1"}, build_keys={"building": KEY},
    memory_bytes=1 << 30, agent_version="0",
)  # fmt: skip
PLAN_PIECES = 3
SETTINGS = Settings(device=DEVICE, device_class=CLASS, site="", broker_host="broker", broker_port=1)
MAX_TURNS = 400


class Clock:
    """Wall time stands, so that equal states are equal to the byte; the monotonic one goes on."""

    def __init__(self, now: float) -> None:
        self._now, self.elapsed = now, 0.0

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self.elapsed


@dataclass(frozen=True)
class Story:
    """What happens to a board.

    Args:
        desired: assignments, in the order in which the controller gives them. The next one comes when the board is in the state
            that ``next_when`` names, or has come to rest.
        refused: versions that acceptance fails.
        ailing: versions whose engine dies while they soak.
        regressing: a version whose engine dies after its commit.
        unbuildable: versions of which no plan can be made.
        key: what plans depend on, on this board, now.
        published: the version with which the metadata was last published.
        ends: what may serve in the end, by version, and the outcome that the last assignment may then have.
    """

    name: str
    tree: Tree
    desired: tuple[bytes, ...]
    ends: dict[str, tuple[Outcome, ...]]
    published: str = "4"
    next_when: State | None = None
    refused: frozenset[str] = frozenset()
    ailing: frozenset[str] = frozenset()
    regressing: str = ""
    unbuildable: frozenset[str] = frozenset()
    key: str = KEY


class SimulatedRuntime:
    """Serves what it can read and verify. Survives the agent, not a power cut."""

    def __init__(self, depot: Depot, disk: MemoryDisk, ailing: frozenset[str], key: str = KEY) -> None:
        self._depot, self._disk, self._ailing, self._key = depot, disk, ailing, key
        self._version_of = {made.digest: version for version, made in depot.releases.items()}
        self.serving: str | None = None
        self.loaded: list[str] = []
        self._boot()

    def _boot(self) -> None:
        try:
            found = slots.read(STATE, files=self._disk.calm())
        except ArtifactError:
            return
        for slot in (found.serving, found.active, found.previous):
            if slot is not None and is_whole(self._disk, slot.manifest) and self._has_plan(slot.manifest):
                self.serving, self.loaded = slot.manifest, [slot.manifest]
                return

    def _has_plan(self, manifest: str) -> bool:
        return has_plan(self._depot, self._disk, manifest, self._key)

    def on(self, disk: MemoryDisk) -> SimulatedRuntime:
        """The same runtime, after the agent alone died."""
        self._disk = disk
        return self

    def load(self, manifest: str, mode: str = "auto", timeout_s: float = 0.0) -> Loaded:
        if not is_whole(self._disk, manifest):
            raise ArtifactError(f"{manifest} is not whole")
        if not self._has_plan(manifest):
            raise NotFoundError(f"no plan of {manifest}")
        if manifest not in self.loaded:
            self.loaded.append(manifest)
        return Loaded(manifest=manifest, mode="blue-green", why="memory holds both")

    def switch(self, manifest: str, timeout_s: float = 0.0) -> Switched:
        if manifest not in self.loaded:
            raise NotFoundError(f"{manifest} is not loaded")
        before, self.serving = self.serving, manifest
        return Switched(manifest=manifest, previous=before, mode="blue-green")

    def shadow(self, manifest: str) -> Shadowing:
        raise AssertionError("no release of the depot asks for a shadow")

    def retire(self, manifest: str, timeout_s: float = 0.0) -> Retired:
        assert manifest != self.serving, "the agent must not stop what serves"
        if manifest in self.loaded:
            self.loaded.remove(manifest)
        return Retired(manifest)

    def status(self, crashes: int = 0) -> StatusReport:
        if self.serving is None:
            self._boot()  # as the real one, it goes on trying to serve what it should
        return StatusReport(
            serving=self.serving, standby=None, waiting=0, requests=0, failed=0, swaps=0, pid=1, memory_bytes=0,
            uptime_s=1.0, versions=tuple(self._version(m, crashes) for m in self.loaded),
        )  # fmt: skip

    def _version(self, manifest: str, crashes: int) -> VersionStatus:
        version = self._version_of[manifest]
        return VersionStatus(
            manifest=manifest, model="toy", version=version, engine="onnxruntime", state="ready",
            serving=manifest == self.serving, standby=False, requests=0, failed=0,
            crashes=crashes or (1 if version in self._ailing else 0), retried=0, p50_ms=None, p95_ms=None,
            in_flight=0, pid=2, memory_bytes=0, providers=(), unconfined=(), last_problem="killed by SIGSEGV",
        )  # fmt: skip


def is_whole(disk: MemoryDisk, manifest: str) -> bool:
    """Whether every byte of an artifact is there, by digest."""
    layout = Layout(STATE / "artifacts", read_only=True, files=disk.calm())
    try:
        for blob in layout.manifest(manifest).blobs():
            layout.check(blob)
    except EdgefleetError:
        return False
    return True


def has_plan(depot: Depot, disk: MemoryDisk, manifest: str, key: str) -> bool:
    """Whether an artifact's engine can load it: its plan is there to the byte and of this key, where it needs one."""
    if manifest not in depot.built:
        return True
    try:
        plans.find(Layout(STATE / "artifacts", read_only=True, files=disk.calm()), manifest, key)
    except (NotFoundError, ArtifactError):
        return False
    return True


class Examiner:
    """The real checks, in this process; building and acceptance as the story has them."""

    def __init__(self, depot: Depot, disk: MemoryDisk, story: Story) -> None:
        self._disk, self._depot, self._key = disk, depot, story.key
        self._unbuildable = {depot.manifest(version) for version in story.unbuildable}
        self._refused = {depot.manifest(version) for version in story.refused}

    def admit(self, request: AdmitRequest) -> Admission:
        tree, folder = self._disk.tree(), request.metadata
        metadata = {
            path[len(folder) + 1 :]: content for path, content in tree.items()
            if path.startswith(f"{folder}/") and content is not None and "/." not in path
        }  # fmt: skip
        return _admit(
            request.root,
            tuple(sorted(metadata.items())),
            request.desired,
            msgspec.json.encode(request.floors),
            request.now,
        )

    def check(self, state: Path, assignment: Assignment) -> Checked:
        try:
            return verify_child.check(Layout(state / "artifacts", read_only=True, files=self._disk), assignment)
        except EnvironmentProblem:
            raise
        except EdgefleetError as exc:
            raise Refusal(exc, assignment.id) from exc

    def build(self, state: Path, manifest: str, order: BuildOrder) -> BuildReport:
        assert manifest in self._depot.built, "an engine that takes models as they are has nothing to build"
        if manifest in self._unbuildable:
            order.take(b"the beginning of a plan")
            return BuildReport(reason="an operator is not supported")
        if order.have == self._key:
            return BuildReport(self._key)
        for number in range(PLAN_PIECES):
            order.tell("building", number, PLAN_PIECES)
            order.take(f"piece {number} of the plan of {manifest} by {self._key}; ".encode() * 20)
        return BuildReport(self._key, anew=True)

    def accept(self, state: Path, manifest: str, threads: int) -> AcceptanceReport:
        assert has_plan(self._depot, self._disk, manifest, self._key), "accepted before it was built"
        if manifest in self._refused:
            return AcceptanceReport(verdict=Verdict.FAILED, reason="agreement is below its limit")
        return AcceptanceReport(verdict=Verdict.PASSED)


class NotedSigner:
    """Equal results have equal signatures, so that equal states are equal to the byte; the real key's are never twice the same."""

    def sign(self, payload: bytes) -> SignedResult:
        envelope = Envelope(
            payload=base64.b64encode(payload).decode(), payload_type=PAYLOAD_TYPE,
            signatures=(EnvelopeSignature("key", digest_of(payload)),),
        )  # fmt: skip
        return SignedResult(envelope=envelope, certificate="a certificate")


def check_signed(told: Reported | AgentReport, subject: Subject) -> None:
    """What is told of the last assignment is signed, as it is told.

    Raises:
        AssertionError: it is not.
    """
    assert told.ended is not None, "no outcome was told"
    assert told.result is not None, f"{told.ended} was told without a signature"
    signed = results.decode(results.payload(told.result.envelope))
    assert signed == results.Result(device=DEVICE, ended=told.ended, subject=subject), f"{signed} was signed"
    (signature,) = told.result.envelope.signatures
    assert signature.sig == digest_of(results.payload(told.result.envelope))


@functools.lru_cache(maxsize=4096)
def _admit(
    root: bytes, metadata: tuple[tuple[str, bytes], ...], desired: bytes, floors: bytes, now: float
) -> Admission:
    """The real trust path; equal questions have equal answers, and signatures are slow."""
    known, named = msgspec.json.decode(floors, type=Floors), ""
    try:
        repository = trust.ImageRepository(root, dict(metadata).get, CLASS, known, now)
        named = trust.check_assignment(repository.targets, desired, now=now)[
            0
        ].id  # its signature is good, as the real child says
        return trust.admit(repository, desired, device=DEVICE, device_class=CLASS, board=BOARD, floors=known, now=now)
    except trust.Incomplete:
        raise
    except EdgefleetError as exc:
        raise Refusal(exc, named) from exc


@dataclass
class Wire:
    """The controller's end: everything retained arrives at once, whatever is wanted too.

    ``carries`` says of how many chunks more of a blob it does so; of one that is not in there, of all.
    """

    depot: Depot
    metadata: dict[str, bytes]
    put: Callable[[Item], None]
    reported: Reported | None = None
    refused: list[Refused] = field(default_factory=list)
    stored: dict[tuple[str, int], bytes] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    carries: dict[str, int] = field(default_factory=dict)

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def came_up(self) -> None: ...

    def follow_metadata(self, files: tuple[str, ...]) -> None:
        for name in files:
            if name in self.metadata:
                self.put(MetadataFile(name, self.metadata[name]))

    def listen(self, digest: str) -> None: ...

    def unlisten(self, digest: str) -> None: ...

    def want(self, want: Want) -> None:
        for first, last in want.missing:
            for number in range(first, last + 1):
                if want.digest in self.carries:
                    if not self.carries[want.digest]:
                        return
                    self.carries[want.digest] -= 1
                self.put(Chunk(want.digest, number, self.depot.chunk(want.digest, number, want.chunk_bytes)))

    def quiet_s(self) -> float:
        return math.inf

    def report(self, reported: Reported) -> None:
        self.reported = reported
        if reported.problem:
            self.problems.append(reported.problem)

    def event(self, content: bytes) -> None:
        event = decode(content, Event)
        key = (event.boot, event.sequence)
        if self.stored.setdefault(key, content) is content and isinstance(event.body, Refused):
            self.refused.append(event.body)
        self.put(Acked(Ack(event.boot, event.sequence)))

    def fetch(self, digest: str, size: int, chunk_bytes: int, numbers: list[int]) -> None: ...


class Inbox(queue.Queue[Item]):
    """Notes what the agent has promised: from an admission on, something may be done for the assignment."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self._agent = agent

    def put(self, item: Item, block: bool = True, timeout: float | None = None) -> None:
        if isinstance(item, AdmissionDone) and isinstance(item.result, Admission):
            self._agent.promised = item.result.floors
        super().put(item, block, timeout)


class Agent:
    """One start of the agent on a disk.

    Args:
        posted: how many of the story's assignments the controller has given so far.
        promised: the floors that the board has acted on before.
        start: which start of the agent it is, from where the power was cut first.
        kernel_boot: which start of the board.
    """

    def __init__(
        self, depot: Depot, story: Story, disk: MemoryDisk, runtime: SimulatedRuntime, posted: int = 1,
        promised: Floors | None = None, start: int = 0, kernel_boot: str = "",
    ) -> None:  # fmt: skip
        self.depot, self.story, self.disk, self.runtime = depot, story, disk, runtime
        self.posted, self.promised, self.start = posted, promised or Floors(), start
        self.clock = Clock(depot.clock.now())
        self._inbox = Inbox(self)
        self.wire = Wire(depot, depot.publications[story.published], self._inbox.put)
        self._examined_regression = False
        board = msgspec.structs.replace(BOARD, build_keys={"building": story.key})
        self.runner = Runner(
            STATE, SETTINGS, board, f"boot-{start}", self._inbox,
            Ports(
                uplink=self.wire, runtime=runtime, examiner=Examiner(depot, disk, story), signer=NotedSigner(),
                clock=self.clock, files=disk, spawn=lambda name, work: work(),
            ),
            kernel_boot=kernel_boot,
        )  # fmt: skip
        self._inbox.put(Up())
        self._inbox.put(Desired(story.desired[posted - 1]))

    def run(self, max_turns: int = MAX_TURNS) -> None:
        """Until the board rests at what the controller wants of it.

        Raises:
            AssertionError: it does not come to rest.
        """
        for _ in range(max_turns):
            if not self.turn():
                return
        state = self.wire.reported.state.value if self.wire.reported else "silence"
        raise AssertionError(f"wedged in {state}: {self.wire.problems[-1:]}")

    def turn(self) -> bool:
        """One turn of the agent's loop; False when there is nothing to come."""
        try:
            item: Item | None = self._inbox.get_nowait()
        except queue.Empty:
            item = None
            self.clock.elapsed += 1.0
        self.runner.turn(item)
        self._next_assignment()
        if item is not None or not self._inbox.empty():
            return True
        return not self._at_rest()

    def _next_assignment(self) -> None:
        told = self.wire.reported
        if self.posted == len(self.story.desired) or told is None:
            return
        if told.state is self.story.next_when or (self._inbox.empty() and self._at_rest()):
            self._inbox.put(Desired(self.story.desired[self.posted]))
            self.posted += 1

    def _at_rest(self) -> bool:
        told = self.wire.reported
        if told is None or told.state is not State.IDLE or told.problem:
            return False
        if told.desired_seen != digest_of(self.story.desired[self.posted - 1]):
            return False
        if self.story.regressing and not self._examined_regression and self.posted == len(self.story.desired):
            self._examined_regression = True
            if self.runtime.serving == self.depot.manifest(self.story.regressing):
                for crashes in (0, REGRESSION_CRASHES):
                    self._inbox.put(Measured(Health(), self.runtime.status(crashes)))
                return False
        return True


def check_remains(depot: Depot, story: Story, disk: MemoryDisk, promised: Floors) -> None:
    """What must hold at every instant, whatever was cut: judged by the bytes on the disk.

    Raises:
        AssertionError: it does not.
    """
    files = disk.calm()
    journal.read(STATE, files=files)
    found = slots.read(STATE, files=files)
    refused = {depot.manifest(version) for version in story.refused}
    had_one = f"{STATE}/slots.json" in story.tree
    if had_one:
        assert found.serving is not None, "no slot names a model that may serve"
    for slot in (found.active, found.previous):
        if slot is not None:
            assert is_whole(disk, slot.manifest), f"a slot names {slot.version}, which is not whole"
            assert slot.manifest not in refused, f"a slot names {slot.version}, which was not accepted"
            # An engine that was upgraded has its plans built anew; until then they are of the one before.
            keys = {story.key, KEY} if had_one else {story.key}
            assert any(has_plan(depot, disk, slot.manifest, key) for key in keys), f"{slot.version} has no plan"
    floors = verify.read_floors(STATE, files=files)
    assert floors.assignment_version >= promised.assignment_version, "the assignment's floor fell"
    assert floors.clock >= promised.clock, "the clock's floor fell"
    for name, version in promised.versions.items():
        assert floors.versions.get(name, 0) >= version, f"the floor of {name} fell"
    verify.read_root(STATE, files=files)
    settings.read(STATE, files=files)


def named_by(story: Story) -> str:
    """The version that served before the story; empty when none did."""
    active = slots.read(STATE, files=MemoryDisk(story.tree)).active
    return active.version if active else ""


def check_end(agent: Agent, ends: dict[str, tuple[Outcome, ...]] | None = None) -> None:
    """What must hold when the board has come to rest: the right model serves, and what is told is true.

    Args:
        ends: in place of the story's own.

    Raises:
        AssertionError: it does not.
    """
    depot, story, files = agent.depot, agent.story, agent.disk.calm()
    ends = ends or story.ends
    check_remains(depot, story, agent.disk, agent.promised)
    found = slots.read(STATE, files=files)
    told = agent.wire.reported
    assert told is not None
    active = found.active
    version = active.version if active is not None and active.status is not SlotStatus.BAD else ""
    assert version in ends, f"the board ended with {version or 'nothing'}, allowed are {sorted(ends)}"
    check_signed(told, Subject.MODEL)
    assert told.ended is not None
    assert told.ended.outcome in ends[version], f"{version or 'nothing'} serves, {told.ended.outcome.value} was told"
    if told.ended.outcome is not Outcome.REJECTED:
        assert told.desired_seen not in {one.desired for one in agent.wire.refused}, "it was refused, and then followed"
    if version:
        assert active is not None
        assert active.status is SlotStatus.GOOD, f"{version} serves and was left {active.status.value}"
        assert agent.runtime.serving == active.manifest, "the runtime serves something else than the slots say"
    assert found.candidate is None, "a candidate was left"
    kept = {slot.manifest for slot in (found.active, found.previous) if slot is not None}
    layout = Layout(STATE / "artifacts", read_only=True, files=files)
    needed = kept | {blob.digest for manifest in kept for blob in layout.manifest(manifest).blobs()}
    made = plans.read(layout)
    assert set(made) == kept & depot.built, "plans of other artifacts than those that slots name"
    assert all(has_plan(depot, agent.disk, manifest, story.key) for manifest in kept), (
        "a plan is not of the engine as it is"
    )
    needed |= {plan.digest for plan in made.values()}
    assert set(layout.digests()) == needed, "blobs that no slot names were left"
    assert not list(layout.unfinished()), "what never became a blob was left"
    waiting = [name for name in files.names(STATE / "spool") if name.endswith(".seg")]
    assert not waiting, f"the controller has every event, and {waiting} were left"
