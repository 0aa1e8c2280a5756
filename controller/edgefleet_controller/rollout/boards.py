"""Stage 4, rollout: one board's way through a rollout. Pure: receives what boards report, hands on their new standing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
from edgefleet_shared.contract import Verdict
from edgefleet_shared.fingerprint import mismatches
from edgefleet_shared.lifecycle import State
from edgefleet_shared.outcomes import ENDED_BADLY, Outcome

from edgefleet_controller.rollout.gates import Sample
from edgefleet_controller.rollout.views import (
    ENDED,
    Assign,
    BoardView,
    Phase,
    Progress,
    Reopen,
    Rollout,
    Settle,
    Standing,
    TargetArtifact,
)

S = Standing
Fleet = Mapping[str, BoardView]

# A board keeps the time limit by itself; its own word is better than the controller's guess, and needs a moment to arrive.
GRACE_S = 10.0

# Standings in which a board may still have something to say about the assignment that it was given.
_HEARD = frozenset({S.IN_FLIGHT, S.AWAY, S.TOOK, S.FAILED})
# Standings in which a board that left the fleet has no further part; what it did before stays told.
_NEEDED = frozenset({S.WAITING, S.CHOSEN, S.IN_FLIGHT, S.UNCLEAR, S.AWAY, S.RETURNING})
_UNDOABLE = frozenset({S.IN_FLIGHT, S.TOOK, S.FAILED, S.UNCLEAR, S.AWAY})


def by_standing(rollout: Rollout) -> dict[Standing, list[Progress]]:
    sets: dict[Standing, list[Progress]] = {}
    for progress in rollout.boards.values():
        sets.setdefault(progress.standing, []).append(progress)
    return sets


def to_waiting(progress: Progress) -> Progress:
    """An untouched board steps back out of its wave; one that was asked before keeps its wave and is asked again later."""
    return msgspec.structs.replace(progress, standing=S.WAITING, wave=-1)


def to_chosen(progress: Progress, wave: int, now: float) -> Progress:
    return msgspec.structs.replace(progress, standing=S.CHOSEN, wave=wave, since=now)


def to_in_flight(rollout: str, progress: Progress, board: BoardView, now: float) -> Progress:
    """The board with a new assignment. What it had before is noted the first time only: a second attempt must not take the
    rollout's own artifact for it."""
    first = progress.tries == 0
    return msgspec.structs.replace(
        progress,
        standing=S.IN_FLIGHT,
        tries=progress.tries + 1,
        attempt=progress.attempt + 1,
        assignment=_assignment(rollout, progress, now),
        since=now,
        previous=board.good if first else progress.previous,
        before_p95_ms=board.figures.p95_ms if first and board.figures is not None else progress.before_p95_ms,
        outcome=None,
        reason="",
        signed=None,
    )


def _assignment(rollout: str, progress: Progress, now: float) -> str:
    # A name is given to one assignment, ever: a board does nothing about one that it has ended. Rollout and number alone come again
    # when a controller is restored from a backup that lacks what was assigned since.
    return f"{rollout}.{progress.device}.{progress.tries + 1}.{int(now)}"


def deadline(rollout: Rollout, progress: Progress) -> float:
    """When a board's silence about its assignment ends the waiting."""
    return progress.since + board_time_s(rollout) + GRACE_S


def board_time_s(rollout: Rollout) -> float:
    """What a board is given for the whole deployment, its soak included."""
    return rollout.spec.timeout_s + rollout.spec.soak_s


# -------------------------------------------------------------------------------------------------------- what boards say


def observe(rollout: Rollout, fleet: Fleet, now: float) -> list[Settle | Reopen]:
    """The boards whose standing changed by what they reported, or by time."""
    if rollout.phase in ENDED or rollout.phase is Phase.PLANNED:
        return []
    found: list[Settle | Reopen] = []
    judged = {(gate.wave, gate.device_class) for gate in rollout.gates}
    for progress in rollout.boards.values():
        standing = progress.standing
        if standing not in _NEEDED and standing not in _HEARD:
            continue
        board = _member(fleet, progress)
        if board is None:
            if standing in _NEEDED:
                found.append(Settle(progress=_gone(fleet, progress)))
            continue
        if standing in (S.WAITING, S.CHOSEN):
            continue
        changed = _RULES[standing](rollout, progress, board, now)
        if changed is None:
            continue
        found.append(Settle(progress=changed))
        regressed = standing is S.TOOK and changed.standing is S.FAILED
        key = (progress.wave, progress.device_class)
        if regressed and key in judged:
            judged.discard(key)
            found.append(
                Reopen(wave=key[0], device_class=key[1], reason=f"{progress.device} fell back after it had committed")
            )
    return found


def _member(fleet: Fleet, progress: Progress) -> BoardView | None:
    """The board that the rollout selected; None when it left the fleet, or its name is by now that of a board of another class, for which
    nothing was chosen here."""
    board = fleet.get(progress.device)
    if board is None or board.revoked or board.device_class != progress.device_class:
        return None
    return board


def _gone(fleet: Fleet, progress: Progress) -> Progress:
    board = fleet.get(progress.device)
    if board is None or board.revoked:
        reason = "no longer in the fleet, or revoked"
    else:
        reason = f"enrolled anew, as of class {board.device_class}"
    return msgspec.structs.replace(progress, standing=S.EXCLUDED, reason=reason)


def _word(rollout: Rollout, progress: Progress, board: BoardView, now: float) -> Progress | None:
    """The standing that the board's own word on this assignment gives it; None without such a word."""
    ended = board.ended
    if ended is not None and ended.assignment == progress.assignment:
        outcome, reason, acceptance = ended.outcome, ended.reason, ended.acceptance
    elif board.assignment == progress.assignment and board.settled and board.refusal:
        outcome, reason, acceptance = Outcome.REJECTED, board.refusal, None
    elif board.doubt and board.doubted == progress.assignment:
        # Somebody spoke, and not surely the board: that advances nothing and is held against nobody.
        if progress.standing is not S.IN_FLIGHT:
            return None
        return msgspec.structs.replace(progress, standing=S.UNCLEAR, reason=board.doubt, signed=False, since=now)
    else:
        return None
    if outcome is Outcome.SUCCEEDED:
        # Its word must be about this artifact, and alone is not enough: the same report must show it in the active slot.
        manifest = rollout.artifacts[progress.device_class].manifest
        if ended is None or ended.manifest != manifest or board.serving != manifest:
            return None
        standing = S.TOOK
    elif outcome is Outcome.SUPERSEDED or (
        outcome is Outcome.FAILED_NO_CHANGE and acceptance is not None and acceptance.verdict is Verdict.INCONCLUSIVE
    ):
        standing = S.UNCLEAR
    else:
        standing = S.FAILED
    if not reason and acceptance is not None:
        reason = acceptance.reason
    figures = acceptance.figures if acceptance is not None else None
    if standing is progress.standing and outcome is progress.outcome:
        return None
    return msgspec.structs.replace(
        progress,
        standing=standing,
        outcome=outcome,
        reason=reason,
        signed=board.signed and ended is not None,
        since=now,
        accept_p95_ms=figures.p95_ms if figures is not None else progress.accept_p95_ms,
    )


def _in_flight(rollout: Rollout, progress: Progress, board: BoardView, now: float) -> Progress | None:
    told = _word(rollout, progress, board, now)
    if told is not None or now < deadline(rollout, progress):
        return told
    waited = board_time_s(rollout)
    if board.reachable(now, rollout.spec.reach_window_s):
        return msgspec.structs.replace(
            progress, standing=S.FAILED, outcome=Outcome.TIMED_OUT, since=now, reason=f"no outcome within {waited:g} s"
        )
    return _away(rollout, progress, now, f"fell silent after it was assigned; no outcome within {waited:g} s")


def _away(rollout: Rollout, progress: Progress, now: float, reason: str) -> Progress:
    left = progress.wave if progress.wave < rollout.catch_up else progress.left_wave
    return msgspec.structs.replace(
        progress, standing=S.AWAY, wave=rollout.catch_up, left_wave=left, since=now, reason=reason
    )


def _returns(rollout: Rollout, progress: Progress, board: BoardView, now: float) -> Progress | None:
    """A silent board that is heard of again: back into its wave if that is still open, else into the catch-up; its time
    limit begins anew."""
    if rollout.phase is Phase.STOPPING or not board.reachable(now, rollout.spec.reach_window_s):
        return None
    track = rollout.tracks[progress.device_class]
    wave = progress.left_wave if track.wave == progress.left_wave else rollout.catch_up
    back = msgspec.structs.replace(progress, standing=S.IN_FLIGHT, wave=wave, since=now, reason="")
    return _word(rollout, back, board, now) or back


def _took(rollout: Rollout, progress: Progress, board: BoardView, now: float) -> Progress | None:
    told = _word(rollout, progress, board, now)
    return told if told is not None and told.outcome is Outcome.LATE_REGRESSION else None


def _failed(rollout: Rollout, progress: Progress, board: BoardView, now: float) -> Progress | None:
    """The controller's own ``timed_out`` gives way to the board's word, should that still come."""
    return _word(rollout, progress, board, now) if progress.outcome is Outcome.TIMED_OUT else None


def _unclear(rollout: Rollout, progress: Progress, board: BoardView, now: float) -> Progress | None:
    spec = rollout.spec
    due = progress.attempt < spec.attempts and now - progress.since >= spec.retry_after_s
    if due and not board.reachable(now, spec.reach_window_s):
        return _away(rollout, progress, now, "can't be reached to be asked again")
    return None


def _returning(rollout: Rollout, progress: Progress, board: BoardView, now: float) -> Progress | None:
    previous = progress.previous
    assert previous is not None, "only boards that had something are told to return to it"
    if board.assignment != progress.assignment:
        return _moved_on(progress, board, now)
    name = f"{previous.model} {previous.version}".strip() or previous.manifest
    there = board.serving == previous.manifest and board.state is State.IDLE
    ended = board.ended if board.ended is not None and board.ended.assignment == progress.assignment else None
    proven = not board.must_sign or (ended is not None and ended.outcome is Outcome.SUCCEEDED)
    if there and board.settled and proven:
        return _back(progress, S.RETURNED, now, f"serves {name} again")
    if board.settled and board.refusal:
        return _back(progress, S.STUCK, now, f"refused to return to {name}: {board.refusal}")
    if ended is not None and ended.outcome in ENDED_BADLY:
        return _back(
            progress, S.STUCK, now, f"could not return to {name}: {ended.outcome.value} {ended.reason}".rstrip()
        )
    if now < deadline(rollout, progress):
        return None
    if board.reachable(now, rollout.spec.reach_window_s):
        return _back(progress, S.STUCK, now, f"did not report {name} in time")
    return _back(progress, S.STUCK, now, f"can't be reached; the assignment to return to {name} waits for it")


def _back(progress: Progress, standing: Standing, now: float, reason: str) -> Progress:
    return msgspec.structs.replace(progress, standing=standing, since=now, back_reason=reason)


def _moved_on(progress: Progress, board: BoardView, now: float) -> Progress:
    by = f"rollout {board.holder}" if board.holder else f"assignment {board.assignment}"
    return _back(progress, S.MOVED_ON, now, f"left alone: {by} has it now")


_RULES = {
    S.IN_FLIGHT: _in_flight,
    S.AWAY: _returns,
    S.TOOK: _took,
    S.FAILED: _failed,
    S.UNCLEAR: _unclear,
    S.RETURNING: _returning,
}


# ------------------------------------------------------------------------------------------------------- fit, and figures


def unfit(rollout: Rollout, fleet: Fleet, chosen: Iterable[Progress]) -> list[Settle]:
    """Of boards about to be taken, those that are no longer to be: they do not fit (a board may have been seen for the first
    time since), or have the artifact already."""
    found = []
    for progress in chosen:
        standing, reason = first_standing(rollout.artifacts, fleet[progress.device])
        if standing is not S.WAITING:
            found.append(Settle(progress=msgspec.structs.replace(progress, standing=standing, reason=reason)))
    return found


def first_standing(artifacts: Mapping[str, TargetArtifact], board: BoardView) -> tuple[Standing, str]:
    """Whether a selected board takes part: waiting, had_it or excluded, and why."""
    artifact = artifacts.get(board.device_class)
    if artifact is None:
        return S.EXCLUDED, f"there is no artifact for class {board.device_class}"
    reasons = mismatches(artifact.requires, board.fingerprint) if board.fingerprint is not None else []
    if reasons:
        return S.EXCLUDED, "; ".join(reasons)
    if board.has(artifact.manifest):
        return S.HAD_IT, "already there"
    return S.WAITING, "" if board.fingerprint is not None else "never reported what it is"


def sample(rollout: Rollout, progress: Progress, fleet: Fleet) -> Sample:
    """A board as its gate sees it. Its figures count only if they are of the rollout's version: right after a swap the last
    health report may still be about the one before."""
    board, spec = fleet.get(progress.device), rollout.spec
    figures = board.figures if board is not None else None
    if figures is not None and (figures.model, figures.version) != (spec.model, spec.version):
        figures = None
    outcome = Outcome.SUCCEEDED if progress.standing is S.TOOK else None
    if progress.standing is S.FAILED:
        outcome = progress.outcome
    return Sample(
        device=progress.device,
        outcome=outcome,
        reason=progress.reason,
        accept_p95_ms=progress.accept_p95_ms,
        before_p95_ms=progress.before_p95_ms,
        figures=figures,
    )


def baseline(rollout: Rollout, fleet: Fleet, device_class: str, now: float) -> list[Sample]:
    """The reachable boards of the class that serve something other than the rollout's artifact."""
    artifact, spec = rollout.artifacts[device_class], rollout.spec
    found = []
    for board in fleet.values():
        if board.device_class != device_class or not board.serving or board.serving == artifact.manifest:
            continue
        if not board.reachable(now, spec.reach_window_s):
            continue
        accept, figures = None, board.figures
        if board.ended is not None and board.ended.manifest == board.serving and board.ended.acceptance is not None:
            measured = board.ended.acceptance.figures
            accept = measured.p95_ms if measured is not None else None
        if figures is not None and (figures.model, figures.version) == (spec.model, spec.version):
            figures = None
        found.append(Sample(device=board.device, accept_p95_ms=accept, figures=figures))
    return found


# ---------------------------------------------------------------------------------------------------------------- going back


def to_undo(rollout: Rollout) -> list[Progress]:
    """The touched boards that a roll-back has still to deal with."""
    return [
        p for p in rollout.boards.values() if p.tries and p.standing in _UNDOABLE and rollout.undo_wave in (-1, p.wave)
    ]


def go_back(rollout: Rollout, fleet: Fleet, todo: Sequence[Progress], now: float) -> tuple[list[Settle], list[Assign]]:
    """How each board of ``todo`` is undone: settled at once where nothing can or need be sent, else told to return."""
    settled: list[Settle] = []
    back: list[Assign] = []
    for progress in sorted(todo, key=lambda p: (p.rank, p.device)):
        board = _member(fleet, progress)
        if board is None:
            settled.append(Settle(progress=_gone(fleet, progress)))
        elif board.holder or board.assignment != progress.assignment:
            settled.append(Settle(progress=_moved_on(progress, board, now)))
        elif progress.previous is None:
            standing, reason = _nothing_before(rollout, progress, board)
            if standing is not None:
                settled.append(Settle(progress=_back(progress, standing, now, reason)))
        else:
            returning = msgspec.structs.replace(
                progress,
                standing=S.RETURNING,
                tries=progress.tries + 1,
                assignment=_assignment(rollout.name, progress, now),
                since=now,
            )
            back.append(Assign(progress=returning, manifest=progress.previous.manifest, back=True))
    return settled, back


def _nothing_before(rollout: Rollout, progress: Progress, board: BoardView) -> tuple[Standing | None, str]:
    """A board's first artifact can't be undone by another one: a failed one changed nothing, a sound one is left serving."""
    if progress.standing is S.IN_FLIGHT:
        return None, ""
    if progress.standing is not S.AWAY and board.serving != rollout.artifacts[progress.device_class].manifest:
        return S.RETURNED, "serves nothing, as before"
    if progress.standing is S.AWAY:
        return S.STUCK, "can't be reached, and had nothing before to return to"
    return S.STUCK, "had nothing before to return to; it keeps this version"
