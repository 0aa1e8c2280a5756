"""Stage 2, compile: pruning, gradually. Pure: receives a plan and what its steps led to, hands on the next step, or why there is none.

::

    step 1 ──▶ tuned, judged ──▶ good ──▶ step 2 ──▶ ... ──▶ the target
                    │                        │
                    └▶ lost too much ──▶ tuned once more ──▶ good: go on; else stop: the last good network is the candidate

Each step takes a little more, by the cubic schedule of Zhu & Gupta 2017 (arXiv 1710.01878, what tfmot calls PolynomialDecay): much while there
is much to spare, little near the end. A network that is pruned in one go often does not come back (docs/adr/0014).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from edgefleet_controller.model_version import PruningPlan

POWER = 3  # of the schedule


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """``structured``: share of the weights whose channels are gone after it; ``unstructured``: share of those left that are zero. A step that is
    ``again`` takes nothing more and only tunes."""

    number: int  # from 1
    structured: float
    unstructured: float
    again: bool = False


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """A step that was taken. ``key`` finds its network in the cache; ``sparsity`` is the share of the weights that is gone; ``accuracy`` and what it
    ``misses`` are of training samples that were set aside, against the budget of the class."""

    step: Step
    key: str
    sparsity: float
    agreement: float
    accuracy: float | None
    float_accuracy: float | None
    misses: tuple[str, ...]


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """All steps, and why there are no more (empty: the target was reached)."""

    steps: tuple[Tried, ...]
    stopped: str

    @property
    def good(self) -> tuple[Tried, ...]:
        """The steps whose network is within the budget, the sparsest last."""
        return tuple(tried for tried in self.steps if not tried.misses)


def schedule(plan: PruningPlan) -> tuple[Step, ...]:
    """The steps to the target; each takes channels, then single weights of what is left."""
    shares = [1 - (1 - number / plan.steps) ** POWER for number in range(1, plan.steps + 1)]
    return tuple(
        Step(number=number, structured=share * plan.structured, unstructured=share * plan.unstructured)
        for number, share in enumerate(shares, 1)
    )


def following(plan: PruningPlan, done: Sequence[Tried]) -> Step | None:
    """The step to take now; None at the target, or where the last one could not be made good."""
    steps = schedule(plan)
    if not done:
        return steps[0]
    last = done[-1]
    if last.misses:
        return None if last.step.again else msgspec.structs.replace(last.step, again=True)
    return steps[last.step.number] if last.step.number < len(steps) else None


def ended(done: Sequence[Tried]) -> Pruned:
    """What pruning came to."""
    last = done[-1]
    if not last.misses:
        return Pruned(steps=tuple(done), stopped="")
    good = [tried for tried in done if not tried.misses]
    kept = f"what was good is kept, {good[-1].sparsity:.0%} gone" if good else "no step was good"
    told = (
        f"pruning stopped where {last.sparsity:.0%} of the weights were gone: {'; '.join(last.misses)}, after being tuned "
        f"{'twice' if last.step.again else 'once'}; {kept}"
    )
    return Pruned(steps=tuple(done), stopped=told)
