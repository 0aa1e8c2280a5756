"""Stage 4, rollout: receives a spec, the artifacts and the fleet; hands on the rollout to be, and says for every board what it
gets, in which wave, or why not. Pure.

The plan is no second copy of the engine's rules: it runs the engine against boards that all succeed at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from edgefleet_shared.errors import ConflictError, InputError
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import Ended
from edgefleet_shared.outcomes import Outcome
from edgefleet_shared.topics import check_name

from edgefleet_controller.rollout import boards, engine, waves
from edgefleet_controller.rollout.views import (
    ArtifactRef,
    Assign,
    BoardView,
    Figures,
    Phase,
    Progress,
    Rollout,
    RolloutSpec,
    Standing,
    TargetArtifact,
    Track,
)

S = Standing
_NAMED = 10


class PlanRow(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan says about one board. ``wave`` is "" for a board that gets nothing; ``why`` says why not, or why so late."""

    device: str
    device_class: str
    manifest: str
    wave: str
    standing: Standing
    why: str


def create(
    name: str,
    spec: RolloutSpec,
    artifacts: Mapping[str, TargetArtifact],
    fleet: Mapping[str, BoardView],
    now: float,
) -> Rollout:
    """The rollout, planned. Its selection is fixed from here on.

    Args:
        artifacts: by device class.
        fleet: every board, by name; ``holder`` must tell of unfinished rollouts.

    Raises:
        InputError: the spec can't be used, it selects no board, or none of the boards that it selects can take it.
        ConflictError: another unfinished rollout holds one of the boards.
    """
    check_name(name, "rollout")
    spec.check()
    named = set(spec.selector.devices).union(*(wave.devices for wave in spec.waves))
    unknown = sorted(named - fleet.keys())
    if unknown:
        raise InputError(f"no such device: {', '.join(unknown[:_NAMED])}", hint="fleet device list shows the names")
    selected = [b for b in fleet.values() if not b.revoked and spec.selector.matches(b)]
    if not selected:
        raise InputError(
            "the rollout's selector matches no board", hint="fleet device list shows classes, sites and labels"
        )
    outside = sorted(set().union(*(wave.devices for wave in spec.waves)) - {b.device for b in selected})
    if outside:
        raise InputError(f"a wave names devices that the selector leaves out: {', '.join(outside[:_NAMED])}")
    progress: dict[str, Progress] = {}
    for board in sorted(selected, key=lambda b: b.device):
        standing, reason = boards.first_standing(artifacts, board)
        progress[board.device] = Progress(
            device=board.device, device_class=board.device_class, rank=waves.rank(name, board.device),
            standing=standing, reason=reason, since=now,
        )  # fmt: skip
    taking_part = {d: p for d, p in progress.items() if p.standing is not S.EXCLUDED}
    if not taking_part:
        reasons = sorted({f"{p.device}: {p.reason}" for p in progress.values()})
        raise InputError("none of the selected boards can take this version: " + "; ".join(reasons[:_NAMED]))
    held = [(d, fleet[d].holder) for d in taking_part if fleet[d].holder]
    if held:
        told = ", ".join(f"{device} by {holder}" for device, holder in held[:_NAMED])
        more = f" and {len(held) - _NAMED} more" if len(held) > _NAMED else ""
        raise ConflictError(
            f"{len(held)} boards are held by another rollout that has not ended: {told}{more}",
            hint=f"let it end, or stop it: fleet rollout abort {held[0][1]}",
        )
    classes = sorted({p.device_class for p in taking_part.values()})
    return Rollout(
        name=name, spec=spec, waves=waves.in_full(spec), artifacts={c: artifacts[c] for c in classes},
        boards=progress, tracks={c: Track() for c in classes}, created_at=now,
    )  # fmt: skip


def plan(rollout: Rollout, fleet: Mapping[str, BoardView], now: float) -> list[PlanRow]:
    """For every selected board what it gets, in which wave, or why not, if every board takes it and none goes or comes.

    Args:
        rollout: as :func:`create` made it.
    """
    # How many are in flight at once does not change who is in which wave.
    dry = msgspec.structs.replace(rollout, spec=msgspec.structs.replace(rollout.spec, max_in_flight=0))
    rehearsed = dict(fleet)
    while True:
        decisions = engine.decide(dry, rehearsed, now)
        dry = engine.apply(dry, decisions, now)
        given = [d for d in decisions if isinstance(d, Assign)]
        if not given:
            break
        for decision in given:
            rehearsed[decision.progress.device] = _took(
                rehearsed[decision.progress.device], decision, rollout.spec, now
            )
    return [_row(dry, fleet[p.device], p, now) for p in dry.boards.values()]


def _took(board: BoardView, decision: Assign, spec: RolloutSpec, now: float) -> BoardView:
    assignment, manifest = decision.progress.assignment, decision.manifest
    return msgspec.structs.replace(
        board, state=State.IDLE, serving=manifest, good=ArtifactRef(manifest, spec.model, spec.version),
        assignment=assignment, assigned_manifest=manifest, settled=True, refusal="", figures=Figures(),
        ended=Ended(assignment=assignment, manifest=manifest, outcome=Outcome.SUCCEEDED, at=now),
    )  # fmt: skip


def _row(dry: Rollout, board: BoardView, progress: Progress, now: float) -> PlanRow:
    standing, wave, why = progress.standing, dry.wave_name(progress.wave), progress.reason
    manifest = dry.artifacts[board.device_class].manifest if board.device_class in dry.artifacts else ""
    if standing is S.WAITING:
        window = dry.spec.reach_window_s
        if not board.reachable(now, window):
            late = dry.tracks[board.device_class].wave >= dry.catch_up
            wave = dry.wave_name(dry.catch_up if late else dry.tracks[board.device_class].wave)
            seen = f"not seen for {now - board.last_seen:.0f} s" if board.last_seen else "never seen"
            why = f"when it comes back ({'offline' if not board.online else 'silent'}, {seen})"
        else:
            why = dry.reason if dry.phase is Phase.PAUSED else "an earlier wave does not end"
    elif standing in (S.EXCLUDED, S.HAD_IT):
        wave = ""
    return PlanRow(
        device=board.device, device_class=board.device_class, manifest=manifest if standing is not S.EXCLUDED else "",
        wave=wave, standing=standing, why=why,
    )  # fmt: skip
