"""Stage 4, rollout: the engine's way forward: judge, advance, open, assign, pause, end. Pure; its rules stand in engine.py.

Receives a running rollout, the fleet and the time; hands on the next layer of decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
from edgefleet_shared.contract import Verdict

from edgefleet_controller.rollout import boards, gates, waves
from edgefleet_controller.rollout.boards import Fleet, by_standing
from edgefleet_controller.rollout.views import (
    Assign,
    Decision,
    Enter,
    Gate,
    Judge,
    Move,
    Phase,
    Progress,
    Rollout,
    Settle,
    Standing,
    Track,
)

S = Standing

# Standings of boards that are in a wave and count for it.
_IN_WAVE = frozenset({S.CHOSEN, S.IN_FLIGHT, S.TOOK, S.FAILED, S.UNCLEAR})


class Ground:
    """The rollout laid out for one layer of the forward phases: members, gates and candidates by wave and class."""

    def __init__(self, rollout: Rollout, fleet: Fleet, now: float, *, asks_again: bool = True) -> None:
        self.rollout, self.fleet, self.now, self.asks_again = rollout, fleet, now, asks_again
        self.gates = {(gate.wave, gate.device_class): gate for gate in rollout.gates}
        self.members: dict[tuple[int, str], list[Progress]] = {}
        self.silent: dict[tuple[int, str], int] = {}
        self.left: dict[tuple[int, str], int] = {}
        self.waiting: dict[str, list[Progress]] = {}
        self.begun: dict[str, int] = {}
        for p in rollout.boards.values():
            if p.standing in _IN_WAVE:
                self.members.setdefault((p.wave, p.device_class), []).append(p)
                self.begun[p.device_class] = self.begun.get(p.device_class, 0) + 1
            elif p.standing is S.HAD_IT:
                self.begun[p.device_class] = self.begun.get(p.device_class, 0) + 1
            elif p.standing is S.WAITING:
                self.waiting.setdefault(p.device_class, []).append(p)
            elif p.standing is S.AWAY:
                key = (p.left_wave, p.device_class)
                self.silent[key] = self.silent.get(key, 0) + 1
            elif p.standing is S.EXCLUDED:
                key = (p.wave, p.device_class)
                self.left[key] = self.left.get(key, 0) + 1

    def pending(self, members: Iterable[Progress]) -> bool:
        """Whether some of them will still give a word, or be asked again."""
        attempts = self.rollout.spec.attempts if self.asks_again else 0
        return any(
            p.standing in (S.CHOSEN, S.IN_FLIGHT) or (p.standing is S.UNCLEAR and p.attempt < attempts) for p in members
        )

    def candidates(self, device_class: str) -> list[Progress]:
        """Boards of the class that no wave took yet and that can be reached now."""
        window, now, fleet = self.rollout.spec.reach_window_s, self.now, self.fleet
        return [p for p in self.waiting.get(device_class, ()) if fleet[p.device].reachable(now, window)]

    def has_passed_any(self, device_class: str) -> bool:
        return any(gate.verdict is Verdict.PASSED for (_, name), gate in self.gates.items() if name == device_class)

    def active(self, device_class: str) -> list[Progress]:
        """The members of the wave that the class is in."""
        return self.members.get((self.rollout.tracks[device_class].wave, device_class), [])


def run(rollout: Rollout, fleet: Fleet, now: float) -> list[Decision]:
    ground = Ground(rollout, fleet, now)
    failed = [gate for gate in rollout.gates if gate.verdict is Verdict.FAILED]
    if failed:
        main = any(gate.wave < rollout.catch_up for gate in failed)
        return [Enter(phase=Phase.STOPPING, reason=gates_reason(rollout, failed),
                      undo_wave=-1 if main else rollout.catch_up)]  # fmt: skip
    for find in (_begin_anew, _refill, judge, _advance, _open, _assign, _pause, _rest):
        found = find(ground)
        if found:
            return found
    return []


def _begin_anew(ground: Ground) -> list[Decision]:
    """A wave whose boards all left the fleet before it was judged has not begun: others are chosen for it."""
    return [
        Move(device_class=name, track=msgspec.structs.replace(track, size=0))
        for name, track in ground.rollout.tracks.items()
        if track.size
        and track.wave < ground.rollout.catch_up
        and not ground.members.get((track.wave, name))
        and not ground.silent.get((track.wave, name))
        and (track.wave, name) not in ground.gates
    ]


def _refill(ground: Ground) -> list[Decision]:
    """Put another board in the place of one that fell silent or left the fleet, if without it the wave has too small a sample.

    At most as many as the wave began with, so that a version that cuts boards off does not eat the fleet one by one.
    """
    rollout = ground.rollout
    found: list[Decision] = []
    for name, track in rollout.tracks.items():
        key = (track.wave, name)
        missing = ground.silent.get(key, 0) + ground.left.get(key, 0)
        if track.wave >= rollout.catch_up or not missing or key in ground.gates:
            continue
        members = ground.members.get(key, [])
        answered = sum(p.standing in (S.TOOK, S.FAILED) for p in members)
        sample = answered + sum(1 for p in _earlier(ground, name, track.wave) if p.standing in (S.TOOK, S.FAILED))
        short = max(rollout.spec.gate.min_sample - sample, 1 - answered)
        room = min(track.size - len(members), track.size - track.replaced, short)
        if ground.pending(members) or room <= 0:
            continue
        chosen = sorted(ground.candidates(name), key=lambda p: (p.rank, p.device))[:room]
        unfit = boards.unfit(rollout, ground.fleet, chosen)
        if unfit:
            return list(unfit)
        if chosen:
            found.append(
                Move(device_class=name, track=msgspec.structs.replace(track, replaced=track.replaced + len(chosen)))
            )
            found += [Settle(progress=boards.to_chosen(p, track.wave, ground.now)) for p in chosen]
    return found


def judge(ground: Ground) -> list[Decision]:
    """Judge every wave whose boards have all ended, or that can't pass any more."""
    rollout, catch_up = ground.rollout, ground.rollout.catch_up
    keys = set(ground.members) | {
        # A wave whose boards all fell silent has no member left, yet must not be taken for one that never began.
        (track.wave, name) for name, track in rollout.tracks.items() if track.size and ground.silent.get((track.wave, name))
    }  # fmt: skip
    found: list[Decision] = []
    for key in sorted(keys):
        wave, name = key
        members, known = ground.members.get(key, []), ground.gates.get(key)
        settled = sum(p.standing in (S.TOOK, S.FAILED, S.UNCLEAR) for p in members)
        if known is not None and not (wave == catch_up and known.settled != settled):
            continue
        earlier = _earlier(ground, name, wave)
        over = [*earlier, *members] if wave == catch_up else members
        failed = sum(p.standing is S.FAILED for p in over)
        hopeless = bool(over) and gates.fails_for_certain(rollout.spec.gate, failed, len(over))
        if not hopeless and ground.pending(members):
            continue
        report = gates.judge(
            rollout.spec.gate,
            [boards.sample(rollout, p, ground.fleet) for p in members],
            earlier=[boards.sample(rollout, p, ground.fleet) for p in earlier],
            silent=ground.silent.get(key, 0) if wave < catch_up else 0,
            baseline=boards.baseline(rollout, ground.fleet, name, ground.now),
            share_over_all=wave == catch_up,
        )
        found.append(
            Judge(
                gate=Gate(
                    wave=wave, device_class=name, verdict=report.verdict, rows=report.rows, reason=report.reason,
                    settled=settled, at=ground.now,
                )
            )
        )  # fmt: skip
    return found


def _earlier(ground: Ground, device_class: str, wave: int) -> list[Progress]:
    return [p for (w, name), found in ground.members.items() if name == device_class and w < wave for p in found]


def _advance(ground: Ground) -> list[Decision]:
    """A class whose wave passed goes on to the next."""
    found: list[Decision] = []
    for name, track in ground.rollout.tracks.items():
        gate = ground.gates.get((track.wave, name))
        if track.wave < ground.rollout.catch_up and gate is not None and gate.verdict is Verdict.PASSED:
            found.append(Move(device_class=name, track=Track(wave=track.wave + 1, notes=track.notes)))
    return found


def _open(ground: Ground) -> list[Decision]:
    """Open the lowest wave that a class with reachable boards has not opened; when all are through, take in late-comers."""
    rollout, catch_up = ground.rollout, ground.rollout.catch_up
    idle: dict[str, list[Progress]] = {}
    floor = catch_up
    for name, track in rollout.tracks.items():
        if track.wave >= catch_up:
            continue
        if track.size:
            floor = min(floor, track.wave)  # opened, and not passed yet
            continue
        idle[name] = ground.candidates(name)
        note = _nothing_to_do(ground, name, idle[name])
        if note:
            notes = track.notes | {rollout.waves[track.wave].name: note}
            return [Move(device_class=name, track=Track(wave=track.wave + 1, notes=notes))]
        if idle[name]:
            floor = min(floor, track.wave)
    if floor < catch_up:
        opening = {name: found for name, found in idle.items() if found and rollout.tracks[name].wave == floor}
        if not opening:
            return []
        unfit = boards.unfit(rollout, ground.fleet, [p for found in opening.values() for p in found])
        if unfit:
            return list(unfit)
        chosen = waves.choose(rollout.waves[floor], opening, ground.begun)
        return _take(ground, floor, chosen)
    late = {name: ground.candidates(name) for name, track in rollout.tracks.items() if track.wave >= catch_up}
    takers = [p for found in late.values() for p in found]
    unfit = boards.unfit(rollout, ground.fleet, takers)
    return list(unfit) or [Settle(progress=boards.to_chosen(p, catch_up, ground.now)) for p in takers]


def _take(ground: Ground, wave: int, chosen: Mapping[str, Sequence[Progress]]) -> list[Decision]:
    found: list[Decision] = []
    for name, members in chosen.items():
        track = ground.rollout.tracks[name]
        if members:
            found.append(Move(device_class=name, track=msgspec.structs.replace(track, size=len(members))))
            found += [Settle(progress=boards.to_chosen(p, wave, ground.now)) for p in members]
        elif ground.has_passed_any(name):
            notes = track.notes | {ground.rollout.waves[wave].name: "nothing to do: its share has begun already"}
            found.append(Move(device_class=name, track=Track(wave=wave + 1, notes=notes)))
    return found


def _nothing_to_do(ground: Ground, name: str, candidates: Sequence[Progress]) -> str:
    """Why the class has nothing to do in its wave, or "". A class that passed no gate yet never skips a wave for want of
    reachable boards: it waits for them."""
    rollout = ground.rollout
    wave = rollout.waves[rollout.tracks[name].wave]
    everybody = [p.device for p in rollout.boards.values() if p.device_class == name and p.standing is not S.EXCLUDED]
    if not ground.waiting.get(name) and not any(
        p.standing is S.AWAY for p in rollout.boards.values() if p.device_class == name
    ):
        return "nothing to do: every board of the class has begun or had it already"
    if not waves.concerns(wave, everybody):
        return "nothing to do: the wave names no board of this class"
    if not candidates and ground.has_passed_any(name):
        return "nothing to do: no board left that can be reached"
    return ""


def _assign(ground: Ground) -> list[Decision]:
    """Send the chosen boards, and those to be asked again, their assignment, as many as may be in flight."""
    rollout, spec, now = ground.rollout, ground.rollout.spec, ground.now
    sets = by_standing(rollout)
    window = spec.reach_window_s
    lapsed = [p for p in sets.get(S.CHOSEN, []) if not ground.fleet[p.device].reachable(now, window)]
    if lapsed:
        return _release(ground, lapsed)
    again = [
        p
        for p in sets.get(S.UNCLEAR, [])
        if p.attempt < spec.attempts
        and now - p.since >= spec.retry_after_s
        and ground.fleet[p.device].reachable(now, window)
    ]
    ready = sorted(sets.get(S.CHOSEN, []) + again, key=lambda p: (p.wave, p.rank, p.device))
    if spec.max_in_flight:
        ready = ready[: max(0, spec.max_in_flight - len(sets.get(S.IN_FLIGHT, [])))]
    return [
        Assign(
            progress=boards.to_in_flight(rollout.name, p, ground.fleet[p.device], now),
            manifest=rollout.artifacts[p.device_class].manifest,
        )
        for p in ready
    ]


def _release(ground: Ground, lapsed: Sequence[Progress]) -> list[Decision]:
    """Chosen boards that went away before they were assigned: untouched, they wait again. A wave that loses all its boards
    this way has not begun."""
    found: list[Decision] = [Settle(progress=boards.to_waiting(p)) for p in lapsed]
    gone = {p.device for p in lapsed}
    for key in {(p.wave, p.device_class) for p in lapsed}:
        wave, name = key
        track = ground.rollout.tracks[name]
        if track.wave == wave and wave < ground.rollout.catch_up:
            left = sum(p.device not in gone for p in ground.members[key]) + ground.silent.get(key, 0)
            found.append(Move(device_class=name, track=msgspec.structs.replace(track, size=left)))
    return found


def _pause(ground: Ground) -> list[Decision]:
    """A gate that could not decide, once no board of any class is under way any more (a failure elsewhere would weigh more)."""
    rollout = ground.rollout
    doubtful = [gate for gate in rollout.gates if gate.verdict in (Verdict.INCONCLUSIVE, Verdict.ERROR)]
    if not doubtful or any(ground.pending(members) for members in ground.members.values()):
        return []
    return [Enter(phase=Phase.PAUSED, reason=gates_reason(rollout, doubtful))]


def _rest(ground: Ground) -> list[Decision]:
    """Whether it is over, or only waits for boards that can't be reached."""
    rollout = ground.rollout
    through = [name for name, track in rollout.tracks.items() if track.wave >= rollout.catch_up]
    if any(ground.pending(members) for members in ground.members.values()):
        # It goes on: what it waited for is no longer so.
        stale = rollout.phase is Phase.RUNNING and rollout.reason
        return [Enter(phase=Phase.RUNNING, reason="")] if stale else []
    if any(track.size for track in rollout.tracks.values() if track.wave < rollout.catch_up):
        return []
    sets = by_standing(rollout)
    absent = len(sets.get(S.WAITING, [])) + len(sets.get(S.AWAY, []))
    if absent:
        if through and any(sets.get(s) for s in (S.TOOK, S.HAD_IT)):
            phase, reason = (
                Phase.CATCHING_UP,
                f"passed for the boards that could be reached; waiting for {absent} others",
            )
        else:
            phase, reason = Phase.RUNNING, f"waiting: none of the {absent} boards that are left can be reached"
        return [] if (phase, reason) == (rollout.phase, rollout.reason) else [Enter(phase=phase, reason=reason)]
    has = len(sets.get(S.TOOK, [])) + len(sets.get(S.HAD_IT, []))
    lacking = [boards.sample(rollout, p, ground.fleet) for s in (S.FAILED, S.UNCLEAR) for p in sets.get(s, [])]
    if not has:
        return [Enter(phase=Phase.FAILED, reason="no selected board could take it; see the boards' reasons")]
    if lacking:
        return [Enter(phase=Phase.INCOMPLETE,
                      reason=f"{len(lacking)} boards within the gates' allowance do not have it: {gates.named(lacking)}")]  # fmt: skip
    return [Enter(phase=Phase.SUCCEEDED, reason="")]


def gates_reason(rollout: Rollout, judged: Iterable[Gate]) -> str:
    """Why these gates did not pass, for people."""
    return "; ".join(
        f"gate of wave {rollout.wave_name(g.wave)} {g.verdict.value} for class {g.device_class}: {g.reason}"
        for g in judged
    )
