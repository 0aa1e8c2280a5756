"""Stage 4, rollout: what the engine is given (a rollout, boards) and what it hands on (decisions), as frozen values. Pure.

No table, no manifest and no message handling in here: the service around the engine translates. Times are seconds since 1970
by the controller's clock; a board's own clock is never compared with it.
"""

from __future__ import annotations

import math
from enum import Enum

import msgspec
from edgefleet_shared.contract import Verdict
from edgefleet_shared.errors import InputError
from edgefleet_shared.fingerprint import Fingerprint, Requirement
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import Ended
from edgefleet_shared.outcomes import Outcome


class Selector(msgspec.Struct, frozen=True, kw_only=True):
    """Which boards. Every field that is given must match; an empty selector is every board that is enrolled."""

    classes: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    devices: tuple[str, ...] = ()

    def matches(self, board: BoardView) -> bool:
        return (
            (not self.classes or board.device_class in self.classes)
            and (not self.sites or board.site in self.sites)
            and (not self.devices or board.device in self.devices)
            and all(board.labels.get(key) == value for key, value in self.labels.items())
        )


class Wave(msgspec.Struct, frozen=True, kw_only=True):
    """One wave: exactly one of the four sizes.

    ``per_class``: so many boards of every class. ``count``: so many boards in all, but at least one of every class.
    ``percent``: until that share of every class's reachable boards has begun, earlier waves included. ``devices``: these.
    """

    name: str
    per_class: int | None = None
    count: int | None = None
    percent: float | None = None
    devices: tuple[str, ...] = ()


class GateSpec(msgspec.Struct, frozen=True, kw_only=True):
    """When a wave has passed for a class. Shares and rates lie in 0 to 1; None means: not looked at.

    ``min_sample`` counts the boards of the class, in this wave and earlier ones, that gave a clear answer.
    ``max_drift`` bounds the population stability index of what the version sees and says against its golden set.
    ``max_latency_ratio`` holds for both the acceptance p95 and the p95 while serving, against the same class's baseline.
    """

    min_sample: int = 1
    max_failed_share: float = 0.0
    max_error_rate: float | None = None
    max_latency_ratio: float | None = None
    max_drift: float | None = None


class RolloutSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator asked for. ``max_in_flight`` 0 is no limit.

    ``timeout_s`` is what a board may take before its soak; the engine waits ``timeout_s + soak_s`` for its word.
    A board whose acceptance was inconclusive is asked again after ``retry_after_s``, ``attempts`` times in all.
    """

    model: str
    version: str
    selector: Selector
    waves: tuple[Wave, ...]
    soak_s: float = 60.0
    timeout_s: float = 900.0
    reach_window_s: float = 900.0
    max_in_flight: int = 0
    gate: GateSpec = GateSpec()
    attempts: int = 3
    retry_after_s: float = 60.0

    def check(self) -> None:
        """Refuse a spec that could not be carried out, or whose gate could not fail.

        Raises:
            InputError: with every problem in its message.
        """
        problems = [] if self.waves else ["it has no wave"]
        names = [wave.name for wave in self.waves]
        if len(set(names)) != len(names):
            problems.append("two waves have the same name")
        for wave in self.waves:
            sizes = (wave.per_class is not None, wave.count is not None, wave.percent is not None, bool(wave.devices))
            if sum(sizes) != 1:
                problems.append(f"wave {wave.name!r} needs exactly one of per_class, count, percent, devices")
            elif (wave.per_class is not None and wave.per_class < 1) or (wave.count is not None and wave.count < 1):
                problems.append(f"wave {wave.name!r} needs at least one board")
            elif wave.percent is not None and not 0 < wave.percent <= 100:
                problems.append(f"wave {wave.name!r}: percent must lie in (0, 100]")
        gate = self.gate
        # Written so that NaN, which compares false with everything, is refused: a malformed threshold must not fail open.
        if gate.min_sample < 1:
            problems.append("gate.min_sample must be at least 1")
        if not 0 <= gate.max_failed_share < 1:
            problems.append("gate.max_failed_share must lie in [0, 1): at 1 it could not fail")
        if gate.max_error_rate is not None and not 0 <= gate.max_error_rate < 1:
            problems.append("gate.max_error_rate must lie in [0, 1)")
        if gate.max_latency_ratio is not None and not 0 < gate.max_latency_ratio < math.inf:
            problems.append("gate.max_latency_ratio must be above 0")
        if gate.max_drift is not None and not 0 < gate.max_drift < math.inf:
            problems.append("gate.max_drift must be above 0")
        if not 0 < self.timeout_s < math.inf or not 0 <= self.soak_s < math.inf:
            problems.append("timeout_s must be above 0 and soak_s not below 0")
        if not 0 < self.reach_window_s < math.inf or not 0 <= self.retry_after_s < math.inf:
            problems.append("reach_window_s must be above 0 and retry_after_s not below 0")
        if self.max_in_flight < 0 or self.attempts < 1:
            problems.append("max_in_flight must not be below 0, attempts at least 1")
        if problems:
            raise InputError("the rollout can't be used: " + "; ".join(problems))


class ArtifactRef(msgspec.Struct, frozen=True):
    """An artifact by its manifest's digest, and what it is called."""

    manifest: str
    model: str = ""
    version: str = ""


class TargetArtifact(msgspec.Struct, frozen=True):
    """What one device class gets in a rollout, and what it needs of a board."""

    manifest: str
    requires: Requirement


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a board measured since it began to serve ``version`` of ``model``; counts, and the last window's latencies in ms and drift
    (population stability index, None while nothing can be said)."""

    model: str = ""
    version: str = ""
    requests: int = 0
    failed: int = 0
    crashes: int = 0
    p50_ms: float | None = None
    p95_ms: float | None = None
    drift: float | None = None


class BoardView(msgspec.Struct, frozen=True, kw_only=True):
    """One board as the engine sees it.

    ``serving`` is the manifest digest that its active slot holds ("" for none), ``good`` the artifact it would fall back to:
    the active one if that is marked good, else the previous one. ``assignment`` and ``assigned_manifest`` are the last one
    that the controller gave; ``settled`` says that the board has come to a decision about it, ``refusal`` why it refused it.
    ``ended`` is its own word: signed, or unsigned of a board that need not sign. A result that is not believed is not there; ``doubt``
    says why, ``doubted`` about which assignment it was. ``holder`` names another unfinished rollout that has selected this board.
    """

    device: str
    device_class: str
    site: str = ""
    labels: dict[str, str] = {}
    online: bool = False
    last_seen: float = 0.0
    revoked: bool = False
    fingerprint: Fingerprint | None = None
    state: State | None = None
    serving: str = ""
    good: ArtifactRef | None = None
    assignment: str = ""
    assigned_manifest: str = ""
    settled: bool = False
    refusal: str = ""
    ended: Ended | None = None
    signed: bool = False
    must_sign: bool = False
    doubt: str = ""
    doubted: str = ""
    figures: Figures | None = None
    holder: str = ""

    def reachable(self, now: float, window_s: float) -> bool:
        """Online, and heard of within the window."""
        return self.online and not self.revoked and now - self.last_seen <= window_s

    def has(self, manifest: str) -> bool:
        """Whether it serves this artifact, marked good, with no other one waiting for it. Slots are not signed: where signatures are
        asked for, only a result that says so is believed, and another board is asked."""
        return (
            not self.must_sign
            or (self.ended is not None and self.ended.outcome is Outcome.SUCCEEDED and self.ended.manifest == manifest)
        ) and (
            self.good is not None
            and self.good.manifest == manifest == self.serving
            and self.state is State.IDLE
            and self.assigned_manifest in ("", manifest)
        )


class Phase(str, Enum):
    PLANNED = "planned"
    RUNNING = "running"
    PAUSED = "paused"  # nothing is sent to any board until a person resumes, aborts or rolls back
    CATCHING_UP = "catching_up"  # passed for the boards that could be reached; waiting for the others
    STOPPING = "stopping"  # a gate failed or a person aborted: nothing new, the boards in flight finish
    ROLLING_BACK = "rolling_back"
    SUCCEEDED = "succeeded"  # every selected board has it
    INCOMPLETE = "incomplete"  # every gate passed, but boards within the gates' allowance do not have it
    ROLLED_BACK = "rolled_back"  # every touched board serves again what it had before
    FAILED = "failed"  # stopped, and not every touched board is known to be back; see the boards' reasons
    ABORTED = "aborted"  # stopped by a person, the boards left as they were


ENDED = frozenset({Phase.SUCCEEDED, Phase.INCOMPLETE, Phase.ROLLED_BACK, Phase.FAILED, Phase.ABORTED})


class Standing(str, Enum):
    """Where a selected board stands in its rollout."""

    WAITING = "waiting"  # selected, in no wave yet
    CHOSEN = "chosen"  # in an open wave, not assigned yet
    IN_FLIGHT = "in_flight"  # assigned, no word yet
    TOOK = "took"
    HAD_IT = "had_it"  # served it before, was not touched
    FAILED = "failed"
    UNCLEAR = "unclear"  # inconclusive acceptance, or superseded: asked again
    AWAY = "away"  # went silent after it was assigned: out of its wave, expected in the catch-up
    EXCLUDED = "excluded"  # not part of it, with the reason
    RETURNING = "returning"  # told to go back to what it had before
    RETURNED = "returned"  # reports that it serves that again
    STUCK = "stuck"  # is not known to be back, with the reason
    MOVED_ON = "moved_on"  # was given something else since, so it was left alone


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """One selected board in a rollout.

    ``rank`` is its place in the spread order; ``wave`` the index of its wave (-1 none, number of waves = catch-up);
    ``left_wave`` the wave that it fell silent in; ``tries`` counts assignments of this rollout, ``attempt`` those since the last
    resume; ``signed`` whether its word is signed with its key, None before it has spoken; ``since`` when it came to its standing; ``previous`` what it served before it was first touched.
    """

    device: str
    device_class: str
    rank: int
    standing: Standing = Standing.WAITING
    wave: int = -1
    left_wave: int = -1
    tries: int = 0
    attempt: int = 0
    assignment: str = ""
    since: float = 0.0
    previous: ArtifactRef | None = None
    outcome: Outcome | None = None
    reason: str = ""
    signed: bool | None = None
    accept_p95_ms: float | None = None
    before_p95_ms: float | None = None
    back_reason: str = ""


class GateRow(msgspec.Struct, frozen=True, kw_only=True):
    """One judged figure of a gate. ``verdict`` None: there was nothing to measure, which is no pass; ``detail`` says why."""

    name: str
    verdict: Verdict | None
    value: float | None
    limit: float | None
    unit: str
    detail: str


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict over one wave for one class. ``settled`` is how many boards of the wave had ended when it was judged."""

    wave: int
    device_class: str
    verdict: Verdict
    rows: tuple[GateRow, ...]
    reason: str
    settled: int
    at: float


class Track(msgspec.Struct, frozen=True, kw_only=True):
    """How far a class is: the index of its wave, how many boards that wave began with, how many were replaced since because
    they fell silent; ``notes`` tells for every wave that had nothing to do why."""

    wave: int = 0
    size: int = 0
    replaced: int = 0
    notes: dict[str, str] = {}


class IntentKind(str, Enum):
    NONE = "none"
    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"
    ROLLBACK = "rollback"


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """The operator's last word. ``number`` rises with each, so that it is obeyed once."""

    kind: IntentKind = IntentKind.NONE
    number: int = 0
    by: str = ""


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout and all that is remembered of it. ``waves`` are the spec's, completed so that the last one takes everybody.

    ``after_stop`` is where ``stopping`` leads; ``undo_wave`` limits a roll-back to one wave (-1: every touched board).
    """

    name: str
    spec: RolloutSpec
    waves: tuple[Wave, ...]
    artifacts: dict[str, TargetArtifact]
    boards: dict[str, Progress]
    tracks: dict[str, Track]
    phase: Phase = Phase.PLANNED
    reason: str = ""
    gates: tuple[Gate, ...] = ()
    intent: Intent = Intent()
    intent_seen: int = 0
    after_stop: Phase = Phase.ROLLING_BACK
    undo_wave: int = -1
    created_at: float = 0.0
    ended_at: float | None = None

    @property
    def catch_up(self) -> int:
        """The index of the catch-up wave."""
        return len(self.waves)

    def wave_name(self, index: int) -> str:
        if index < 0:
            return ""
        return self.waves[index].name if index < len(self.waves) else "catch-up"


class Assign(msgspec.Struct, frozen=True, kw_only=True, tag="assign"):
    """Give the board this artifact; ``progress`` is its standing from then on. ``back``: to undo the rollout."""

    progress: Progress
    manifest: str
    back: bool = False


class Settle(msgspec.Struct, frozen=True, kw_only=True, tag="settle"):
    """A board's standing changed; nothing is sent to it."""

    progress: Progress


class Judge(msgspec.Struct, frozen=True, kw_only=True, tag="judge"):
    gate: Gate


class Reopen(msgspec.Struct, frozen=True, kw_only=True, tag="reopen"):
    """Forget a gate's verdict: it is judged anew."""

    wave: int
    device_class: str
    reason: str


class Move(msgspec.Struct, frozen=True, kw_only=True, tag="move"):
    """A class opens, refills, or goes on to a wave."""

    device_class: str
    track: Track


class Enter(msgspec.Struct, frozen=True, kw_only=True, tag="enter"):
    phase: Phase
    reason: str
    after_stop: Phase = Phase.ROLLING_BACK
    undo_wave: int = -1


class Hear(msgspec.Struct, frozen=True, kw_only=True, tag="hear"):
    """The operator's word with this number was dealt with."""

    number: int


Decision = Assign | Settle | Judge | Reopen | Move | Enter | Hear
