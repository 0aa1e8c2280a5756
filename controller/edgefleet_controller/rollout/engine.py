"""Stage 4, rollout: the engine. Pure: receives a rollout, the fleet and the time, hands on decisions.

The rules.

1. ``decide`` is a function of what is persisted and what boards reported, so a controller that restarts decides the same.
2. Classes go in step: a wave opens when every class that has reachable boards passed the wave before. A class whose boards
   can't be reached waits for itself and holds up nobody; when they return it begins with its own first wave.
3. Only *passed* advances. A failed gate stops the rollout for all classes: nothing new is assigned, boards in flight finish
   (within their time limit) so that the operator is told about every canary, then every touched board is returned to what it had.
   If the gate of the *catch-up* failed, only the boards of the catch-up are returned: the others' gates had passed.
4. Inconclusive boards are asked again, ``attempts`` times. A gate that stays inconclusive, or whose figures are broken, pauses.
5. A board that is online and exceeds its time failed (``timed_out``). One that fell silent leaves its wave for the catch-up
   and counts in no denominator; but a wave of which more boards fell silent than answered is inconclusive (gates.py).
6. Paused means that nothing is sent to any board; what boards report is still recorded.
7. ``succeeded`` means that every selected board has the artifact.

``decide`` works in layers: it finds the next decisions, folds them in, and looks again until nothing is left to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
from edgefleet_shared.contract import Verdict
from typing_extensions import assert_never

from edgefleet_controller.rollout import boards, gates
from edgefleet_controller.rollout.boards import Fleet, by_standing
from edgefleet_controller.rollout.forward import Ground, gates_reason, judge, run
from edgefleet_controller.rollout.views import (
    ENDED,
    Assign,
    Decision,
    Enter,
    Hear,
    IntentKind,
    Judge,
    Move,
    Phase,
    Progress,
    Reopen,
    Rollout,
    Settle,
    Standing,
)

S = Standing

# A layer follows from the layer before; a rollout with more layers at one instant than this goes round in circles.
_MAX_LAYERS = 1000


def decide(rollout: Rollout, fleet: Fleet, now: float) -> list[Decision]:
    """All that is to be done now.

    Args:
        rollout: as persisted.
        fleet: every board that the rollout selected, by name; others of the same classes serve as baseline.
        now: seconds since 1970.

    Returns:
        the decisions in order; an empty list when there is nothing to do until something changes. ``apply`` folds them in.
    """
    decisions: list[Decision] = []
    for _ in range(_MAX_LAYERS):
        layer = _layer(rollout, fleet, now)
        if not layer:
            return decisions
        decisions += layer
        rollout = apply(rollout, layer, now)
        fleet = _as_assigned(fleet, layer)
    raise AssertionError(f"rollout {rollout.name} does not come to rest: {layer[:3]}")


def _as_assigned(fleet: Fleet, layer: Iterable[Decision]) -> Fleet:
    """The fleet as it is once the layer's assignments are persisted, so that the next layer sees what was given."""
    given = {
        d.progress.device: msgspec.structs.replace(
            fleet[d.progress.device],
            assignment=d.progress.assignment,
            assigned_manifest=d.manifest,
            settled=False,
            refusal="",
        )
        for d in layer
        if isinstance(d, Assign)
    }
    return {**fleet, **given} if given else fleet


def apply(rollout: Rollout, decisions: Iterable[Decision], now: float) -> Rollout:
    """The rollout after ``decisions``."""
    changed: dict[str, Progress] = {}
    tracks, verdicts = rollout.tracks, {(gate.wave, gate.device_class): gate for gate in rollout.gates}
    fields: dict[str, object] = {}
    for decision in decisions:
        if isinstance(decision, (Assign, Settle)):
            changed[decision.progress.device] = decision.progress
        elif isinstance(decision, Judge):
            verdicts[(decision.gate.wave, decision.gate.device_class)] = decision.gate
        elif isinstance(decision, Reopen):
            verdicts.pop((decision.wave, decision.device_class), None)
        elif isinstance(decision, Move):
            tracks = tracks | {decision.device_class: decision.track}
        elif isinstance(decision, Enter):
            fields |= {
                "phase": decision.phase,
                "reason": decision.reason,
                "after_stop": decision.after_stop,
                "undo_wave": decision.undo_wave,
                "ended_at": now if decision.phase in ENDED else None,
            }
        elif isinstance(decision, Hear):
            fields["intent_seen"] = decision.number
        else:
            assert_never(decision)
    if changed:
        fields["boards"] = rollout.boards | changed
    return msgspec.structs.replace(
        rollout, tracks=tracks, gates=tuple(verdicts[key] for key in sorted(verdicts)), **fields
    )


def _layer(rollout: Rollout, fleet: Fleet, now: float) -> list[Decision]:
    if rollout.intent.number > rollout.intent_seen:
        return _obey(rollout)
    observed: list[Decision] = list(boards.observe(rollout, fleet, now))
    if observed:
        return observed
    handler = _PHASES.get(rollout.phase)
    return handler(rollout, fleet, now) if handler else []


# ---------------------------------------------------------------------------------------------------- the operator's word


def _obey(rollout: Rollout) -> list[Decision]:
    """Carry out the operator's last word, once. What does not apply in this phase is heard and changes nothing."""
    heard: list[Decision] = [Hear(number=rollout.intent.number)]
    kind, phase = rollout.intent.kind, rollout.phase
    by = f" by {rollout.intent.by}" if rollout.intent.by else ""
    if kind is IntentKind.PAUSE and phase in (Phase.PLANNED, Phase.RUNNING, Phase.CATCHING_UP):
        return [*heard, Enter(phase=Phase.PAUSED, reason=f"paused{by}")]
    if kind is IntentKind.RESUME and phase is Phase.PAUSED:
        return [*heard, *_fresh_attempts(rollout), Enter(phase=Phase.RUNNING, reason="")]
    if kind is IntentKind.ABORT and phase is Phase.ROLLING_BACK:
        return [*heard, Enter(phase=Phase.ABORTED, reason=f"roll-back aborted{by}; boards left as they were")]
    if kind is IntentKind.ABORT and phase not in ENDED:
        return [*heard, Enter(phase=Phase.STOPPING, reason=f"aborted{by}", after_stop=Phase.ABORTED)]
    # Undone again on request even after an end: only a roll-back that already reached every board has nothing left to do.
    if kind is IntentKind.ROLLBACK and (phase not in (Phase.ROLLING_BACK, Phase.ROLLED_BACK) or rollout.undo_wave >= 0):
        return [
            *heard,
            *(Settle(progress=boards.to_waiting(p)) for p in rollout.boards.values() if p.standing is S.CHOSEN),
            Enter(phase=Phase.ROLLING_BACK, reason=f"rolled back{by}"),
        ]
    return heard


def _fresh_attempts(rollout: Rollout) -> list[Decision]:
    """Resuming after an inconclusive gate: its boards are asked again, its verdict is open, silent boards may be replaced."""
    again: list[Decision] = [
        Reopen(wave=gate.wave, device_class=gate.device_class, reason="resumed")
        for gate in rollout.gates
        if gate.verdict in (Verdict.INCONCLUSIVE, Verdict.ERROR)
    ]
    again += [
        Settle(progress=msgspec.structs.replace(p, attempt=0))
        for p in rollout.boards.values()
        if p.standing is S.UNCLEAR and p.attempt
    ]
    again += [
        Move(device_class=name, track=msgspec.structs.replace(track, replaced=0))
        for name, track in rollout.tracks.items()
        if track.replaced
    ]
    return again


# -------------------------------------------------------------------------------------------------- stopping and going back


def _stop(rollout: Rollout, fleet: Fleet, now: float) -> list[Decision]:
    """Nothing new; when the boards in flight have ended, judge what is left to judge, then go where it leads."""
    sets = by_standing(rollout)
    if sets.get(S.CHOSEN):
        return [Settle(progress=boards.to_waiting(p)) for p in sets[S.CHOSEN]]
    if sets.get(S.IN_FLIGHT):
        return []
    judged = judge(Ground(rollout, fleet, now, asks_again=False))
    if judged:
        return judged
    failed = [gate for gate in rollout.gates if gate.verdict is Verdict.FAILED]
    reason = rollout.reason
    if rollout.after_stop is Phase.ROLLING_BACK and failed:
        reason = gates_reason(rollout, failed)
    # A board of an earlier wave may have regressed while the catch-up's gate brought the rollout to a stop.
    undo_wave = -1 if any(gate.wave < rollout.catch_up for gate in failed) else rollout.undo_wave
    return [Enter(phase=rollout.after_stop, reason=reason, undo_wave=undo_wave)]


def _roll_back(rollout: Rollout, fleet: Fleet, now: float) -> list[Decision]:
    todo = boards.to_undo(rollout)
    settled, back = boards.go_back(rollout, fleet, todo, now)
    if settled:
        return list(settled)
    if rollout.spec.max_in_flight:
        under_way = sum(
            p.standing is S.RETURNING and fleet[p.device].reachable(now, rollout.spec.reach_window_s)
            for p in rollout.boards.values()
        )
        back = back[: max(0, rollout.spec.max_in_flight - under_way)]
    if back:
        return list(back)
    sets = by_standing(rollout)
    if todo or sets.get(S.RETURNING):
        return []
    stuck = sets.get(S.STUCK, [])
    kept = sum(p.standing is S.TOOK for p in rollout.boards.values()) if rollout.undo_wave >= 0 else 0
    if not stuck and not kept:
        return [Enter(phase=Phase.ROLLED_BACK, reason=rollout.reason, undo_wave=rollout.undo_wave)]
    reason = rollout.reason
    if kept:
        reason += f"; {kept} boards whose gates had passed keep the version"
    if stuck:
        reason += "; not known to be back: " + ", ".join(
            f"{p.device}: {p.back_reason}" for p in stuck[: gates.NAMED_BOARDS]
        )
    return [Enter(phase=Phase.FAILED, reason=reason, undo_wave=rollout.undo_wave)]


_Handler = Callable[[Rollout, Fleet, float], "list[Decision]"]
_PHASES: dict[Phase, _Handler] = {
    Phase.PLANNED: lambda rollout, fleet, now: [Enter(phase=Phase.RUNNING, reason="")],
    Phase.RUNNING: run,
    Phase.CATCHING_UP: run,
    Phase.STOPPING: _stop,
    Phase.ROLLING_BACK: _roll_back,
}
