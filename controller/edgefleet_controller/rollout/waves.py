"""Stage 4, rollout: which boards a wave takes. Pure: receives the boards that could be taken, hands on the chosen ones."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

from edgefleet_controller.rollout.views import Progress, RolloutSpec, Wave


def rank(rollout: str, device: str) -> int:
    """A board's place in the rollout's spread order: a hash, so the same board is not the canary of every rollout, and
    neighbours by name (often one site, one switch) do not go together. 63 bits, so that every database stores it."""
    return int.from_bytes(hashlib.sha256(f"{rollout}\0{device}".encode()).digest()[:8], "big") >> 1


def in_full(spec: RolloutSpec) -> tuple[Wave, ...]:
    """The spec's waves, with one for the rest at the end unless the last one takes everybody already."""
    if spec.waves and spec.waves[-1].percent == 100:
        return spec.waves
    taken = {wave.name for wave in spec.waves}
    name = next(n for n in ("rest", *(f"rest-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    return (*spec.waves, Wave(name=name, percent=100))


def choose(
    wave: Wave, candidates: Mapping[str, Sequence[Progress]], begun: Mapping[str, int]
) -> dict[str, list[Progress]]:
    """The members of ``wave``.

    Args:
        candidates: for every class that opens the wave, its reachable boards that no wave took yet.
        begun: for every class, how many of its boards have begun or already had the artifact (boards that fell silent are
            not counted: they are in no denominator).

    Returns:
        for every class of ``candidates`` its members in spread order; an empty list where there is none to take.
    """
    ranked = {name: sorted(boards, key=_place) for name, boards in candidates.items()}
    if wave.per_class is not None:
        return {name: boards[: wave.per_class] for name, boards in ranked.items()}
    if wave.percent is not None:
        return {
            name: boards[: max(0, _share(wave.percent, begun.get(name, 0) + len(boards)) - begun.get(name, 0))]
            for name, boards in ranked.items()
        }
    if wave.count is not None:
        chosen = {name: boards[:1] for name, boards in ranked.items()}
        left = wave.count - sum(len(boards) for boards in chosen.values())
        others = sorted((board for boards in ranked.values() for board in boards[1:]), key=_place)
        for board in others[: max(0, left)]:
            chosen[board.device_class].append(board)
        return chosen
    named = set(wave.devices)
    return {name: [board for board in boards if board.device in named] for name, boards in ranked.items()}


def concerns(wave: Wave, devices: Sequence[str]) -> bool:
    """Whether the wave is meant for a class that consists of ``devices``: a wave of named boards may leave a class out."""
    return not wave.devices or not set(wave.devices).isdisjoint(devices)


def _place(board: Progress) -> tuple[int, str]:
    return board.rank, board.device


def _share(percent: float, of: int) -> int:
    # Rounded up, so that a small share of a small class is still a board; 1e-9 forgives 0.1 + 0.2.
    return math.ceil(percent * of / 100 - 1e-9)
