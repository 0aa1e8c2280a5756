"""Boards on a virtual clock for the rollout engine: they succeed, fail, go silent, come back, as told. Carries out decisions the
way the service and real boards would, and holds the rules that must never be broken."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from enum import Enum

import msgspec
from edgefleet_controller.rollout import engine
from edgefleet_controller.rollout.plan import create
from edgefleet_controller.rollout.views import (
    ENDED,
    ArtifactRef,
    Assign,
    BoardView,
    Decision,
    Figures,
    GateSpec,
    Intent,
    IntentKind,
    Phase,
    Rollout,
    RolloutSpec,
    Selector,
    Standing,
    TargetArtifact,
    Wave,
)
from edgefleet_shared.contract import AcceptanceFigures, AcceptanceReport, Verdict
from edgefleet_shared.fingerprint import Fingerprint, Requirement
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import Ended
from edgefleet_shared.outcomes import Outcome

START = 1_750_000_000.0
WORK_S = 10.0  # what a simulated board takes from assignment to outcome
REQUIREMENT = Requirement(arch="x86_64", engine="onnxruntime")
FINGERPRINT = Fingerprint(arch="x86_64", engines={"onnxruntime": "1.20.0"}, memory_bytes=1 << 30)


class Does(str, Enum):
    """What a board does with the rollout's artifact. Going back always works but for ``STUCK``."""

    SUCCEEDS = "succeeds"
    REFUSES = "refuses"  # failed_no_change, with an acceptance report that says why
    FALLS_BACK = "falls_back"  # failed_rolled_back
    CANNOT_TELL = "cannot_tell"  # inconclusive acceptance, always
    CANNOT_TELL_ONCE = "cannot_tell_once"
    HANGS = "hangs"  # online, and never says anything
    GOES_SILENT = "goes_silent"  # loses its line as soon as it is assigned
    SILENT_THEN_BACK = "silent_then_back"  # loses its line, comes back after an hour and does its work
    REGRESSES = "regresses"  # succeeds, and falls back some time after
    STUCK = "stuck"  # succeeds, and refuses to go back


def manifest(device_class: str, version: str) -> str:
    return f"sha256:{device_class}-{version}"


def artifacts(classes: Iterable[str], version: str = "2") -> dict[str, TargetArtifact]:
    return {c: TargetArtifact(manifest(c, version), REQUIREMENT) for c in classes}


def board(device: str, device_class: str = "x86", version: str | None = "1", **fields: object) -> BoardView:
    """A reachable board that serves ``version`` of model m, or nothing."""
    serving = manifest(device_class, version) if version else ""
    given: dict[str, object] = {
        "site": "lab",
        "online": True,
        "last_seen": START,
        "fingerprint": FINGERPRINT,
        "state": State.IDLE,
        "serving": serving,
        "good": ArtifactRef(serving, "m", version) if version else None,
        "assignment": f"old.{device}" if version else "",
        "assigned_manifest": serving,
        "settled": True,
        "figures": Figures(model="m", version=version or "", requests=1000, failed=0, p50_ms=5.0, p95_ms=8.0),
    }
    return BoardView(device=device, device_class=device_class, **(given | fields))  # type: ignore[arg-type]


def fleet_of(per_class: Mapping[str, int], **fields: object) -> dict[str, BoardView]:
    boards = [board(f"{c}-{n}", c, **fields) for c, count in per_class.items() for n in range(count)]  # type: ignore[arg-type]
    return {b.device: b for b in boards}


def spec(*waves: Wave, **fields: object) -> RolloutSpec:
    given: dict[str, object] = {
        "model": "m",
        "version": "2",
        "selector": Selector(),
        "waves": waves
        or (Wave(name="canary", per_class=1), Wave(name="half", percent=50), Wave(name="all", percent=100)),
        "soak_s": 5.0,
        "timeout_s": 60.0,
        "reach_window_s": 600.0,
        "gate": GateSpec(),
        "retry_after_s": 30.0,
    }
    return RolloutSpec(**(given | fields))  # type: ignore[arg-type]


class World:
    """A rollout, its boards and a clock.

    Args:
        does: what boards do; ``Does.SUCCEEDS`` where none is given.
    """

    def __init__(
        self,
        fleet: dict[str, BoardView],
        rollout_spec: RolloutSpec | None = None,
        does: Mapping[str, Does] | None = None,
        name: str = "r2",
        version: str = "2",
    ) -> None:
        self.now = START
        self.fleet = dict(fleet)
        self.does = dict(does or {})
        classes = {b.device_class for b in fleet.values()}
        self.rollout = create(name, rollout_spec or spec(), artifacts(classes, version), fleet, self.now)
        self.first = dict(fleet)
        self.log: list[tuple[float, Decision]] = []
        self.agenda: list[tuple[float, str, str]] = []  # when, what, device
        self.touched: list[str] = []
        self.most_in_flight = 0
        self.asked = 0

    # -- the controller's side

    def tick(self) -> list[Decision]:
        self._heartbeat()
        decisions = engine.decide(self.rollout, self.fleet, self.now)
        assert decisions == engine.decide(self.rollout, self.fleet, self.now), "deciding changed something"
        # What is persisted is all there is: a controller that restarts here goes on from these bytes.
        after = engine.apply(self.rollout, decisions, self.now)
        self.rollout = msgspec.json.decode(msgspec.json.encode(after), type=Rollout)
        assert self.rollout == after
        self._check(decisions)
        for decision in decisions:
            self.log.append((self.now, decision))
            if isinstance(decision, Assign):
                self._given(decision)
        assert engine.decide(self.rollout, self.fleet, self.now) == [], "not at rest after what it decided was done"
        return decisions

    def intend(self, kind: IntentKind) -> None:
        number = self.rollout.intent.number + 1
        self.rollout = msgspec.structs.replace(self.rollout, intent=Intent(kind=kind, number=number, by="ann"))

    def run(self, seconds: float = 7200.0, step_s: float = 5.0) -> Rollout:
        """Turn the clock until the rollout ended, paused, or ``seconds`` are over."""
        until, quiet = self.now + seconds, 0
        self.tick()
        while self.now < until and self.rollout.phase not in ENDED and self.rollout.phase is not Phase.PAUSED:
            # When nothing is going on for a while, time goes in larger steps.
            due = min((at for at, _, _ in self.agenda), default=until)
            step = step_s if quiet < 3 else min(max(due - self.now, step_s), 120.0)
            self.now = min(self.now + step, until)
            self._happen()
            quiet = 0 if self.tick() else quiet + 1
        return self.rollout

    def _check(self, decisions: list[Decision]) -> None:
        failed_before = False
        for decision in decisions:
            if isinstance(decision, Assign) and not decision.back:
                assert not failed_before
                assert self.rollout.phase in (Phase.RUNNING, Phase.CATCHING_UP), "assigned while it should not"
                self.touched.append(decision.progress.device)
        flying = sum(p.standing is Standing.IN_FLIGHT for p in self.rollout.boards.values())
        self.most_in_flight = max(self.most_in_flight, flying)
        limit = self.rollout.spec.max_in_flight
        new = any(isinstance(d, Assign) and not d.back for d in decisions)
        assert not (limit and new and flying > limit), f"{flying} in flight, {limit} allowed"

    def _given(self, decision: Assign) -> None:
        p, self.asked = decision.progress, self.asked + 1
        b = self.fleet[p.device]
        assert decision.manifest in (
            self.rollout.artifacts[b.device_class].manifest,
            getattr(p.previous, "manifest", ""),
        )
        self._set(p.device, assignment=p.assignment, assigned_manifest=decision.manifest, settled=False, refusal="")
        does = self.does.get(p.device, Does.SUCCEEDS)
        if not decision.back and does in (Does.GOES_SILENT, Does.SILENT_THEN_BACK):
            self._set(p.device, online=False)
            if does is Does.SILENT_THEN_BACK:
                self.agenda.append((self.now + 3600, "return", p.device))
        else:
            self.agenda.append((self.now + WORK_S, "end", p.device))

    # -- the boards' side

    def _set(self, device: str, **fields: object) -> None:
        self.fleet[device] = msgspec.structs.replace(self.fleet[device], **fields)

    def _heartbeat(self) -> None:
        for device, b in self.fleet.items():
            if b.online:
                self._set(device, last_seen=self.now)

    def _happen(self) -> None:
        due = [entry for entry in self.agenda if entry[0] <= self.now]
        self.agenda = [entry for entry in self.agenda if entry[0] > self.now]
        for _, what, device in due:
            if what == "return":
                self.connect(device)
            elif what == "regress":
                self._regress(device)
            elif self.fleet[device].online:
                self._end(device)

    def connect(self, device: str) -> None:
        """The board's line comes (back); it does what its retained assignment asks of it."""
        self._set(device, online=True, last_seen=self.now)
        if self.does.get(device) in (Does.GOES_SILENT, Does.SILENT_THEN_BACK):
            self.does[device] = Does.SUCCEEDS
        if not self.fleet[device].settled:
            self.agenda.append((self.now + WORK_S, "end", device))

    def disconnect(self, device: str) -> None:
        self._set(device, online=False)

    def _regress(self, device: str) -> None:
        b, before = self.fleet[device], self.first[device]
        if b.serving == before.serving or b.ended is None:
            return
        self._set(
            device,
            serving=before.serving,
            good=before.good,
            ended=msgspec.structs.replace(b.ended, outcome=Outcome.LATE_REGRESSION, reason="crashed after commit"),
        )

    def _end(self, device: str) -> None:
        b, before = self.fleet[device], self.first[device]
        does = self.does.get(device, Does.SUCCEEDS)
        wanted = b.assigned_manifest
        forward = wanted == self.rollout.artifacts[b.device_class].manifest
        if not forward:
            if does is Does.STUCK:
                self._set(device, settled=True, refusal="stale metadata")
                return
            self._set(device, serving=wanted, good=before.good, settled=True, state=State.IDLE,
                      ended=Ended(assignment=b.assignment, manifest=wanted, outcome=Outcome.SUCCEEDED))  # fmt: skip
            return
        if does is Does.HANGS:
            return
        outcome, verdict, reason = Outcome.SUCCEEDED, Verdict.PASSED, ""
        if does is Does.REFUSES:
            outcome, verdict, reason = Outcome.FAILED_NO_CHANGE, Verdict.FAILED, "agreement 0.21 against 0.95"
        elif does is Does.FALLS_BACK:
            outcome, reason = Outcome.FAILED_ROLLED_BACK, "the engine died while serving"
        elif does in (Does.CANNOT_TELL, Does.CANNOT_TELL_ONCE):
            outcome, verdict, reason = Outcome.FAILED_NO_CHANGE, Verdict.INCONCLUSIVE, "the board was busy"
            if does is Does.CANNOT_TELL_ONCE:
                self.does[device] = Does.SUCCEEDS
        elif does is Does.REGRESSES:
            self.agenda.append((self.now + 20, "regress", device))
        figures = AcceptanceFigures(
            golden_count=16, agreement=0.99, cosine=0.99, load_ms=1, first_ms=1, p50_ms=5, p95_ms=8,
            peak_memory_bytes=1, providers=("CPU",),
        )  # fmt: skip
        ended = Ended(
            assignment=b.assignment, manifest=wanted, outcome=outcome, reason=reason,
            acceptance=AcceptanceReport(verdict=verdict, figures=figures, reason=reason),
        )  # fmt: skip
        self._set(device, settled=True, ended=ended, state=State.IDLE)
        if outcome is Outcome.SUCCEEDED:
            version = self.rollout.spec.version
            self._set(device, serving=wanted, good=ArtifactRef(wanted, "m", version),
                      figures=Figures(model="m", version=version, requests=500, p50_ms=5.0, p95_ms=8.0))  # fmt: skip

    # -- what became of it

    def standing(self, device: str) -> Standing:
        return self.rollout.boards[device].standing

    def serves(self, device: str) -> str:
        return self.fleet[device].serving

    def reference(self, version: str = "2") -> set[str]:
        """The boards that serve ``version``."""
        return {d for d, b in self.fleet.items() if b.serving == manifest(b.device_class, version)}


def random_world(seed: int, boards: int) -> World:
    """A fleet of mixed classes and manners, all from one seed."""
    rng = random.Random(seed)
    classes = [f"c{n}" for n in range(rng.randint(1, 3))]
    fleet = {}
    bad = rng.choice([0.0, 0.0, 0.05, 0.3])
    does: dict[str, Does] = {}
    for n in range(boards):
        c = rng.choice(classes)
        device = f"b{n}"
        fleet[device] = board(
            device, c, version=rng.choice(["1"] * 8 + ["2", None]), online=rng.random() > 0.15, site=f"s{n % 3}"
        )
        does[device] = rng.choice(list(Does)) if rng.random() < bad else Does.SUCCEEDS
    waves = rng.choice(
        [
            (Wave(name="canary", per_class=1), Wave(name="all", percent=100)),
            (Wave(name="canary", per_class=1), Wave(name="half", percent=50), Wave(name="all", percent=100)),
            (Wave(name="few", count=2), Wave(name="tenth", percent=10)),
        ]
    )
    gate = GateSpec(max_failed_share=rng.choice([0.0, 0.0, 0.2]), min_sample=1)
    rollout_spec = spec(*waves, gate=gate, max_in_flight=rng.choice([0, 0, 1, 3]))
    return World(fleet, rollout_spec, does)
