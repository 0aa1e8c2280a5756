"""Stage 2, compile: the quality search. Pure: receives what was measured so far, hands on the recipes to try next, and the choice.

::

    first ──▶ measured ──▶ fits? (quick: ship it) ──▶ by layers ──▶ measured ──▶ pruned (where asked for) ──▶ choose

Candidates are ordered by figures that repeat exactly (agreement, noise, bytes); latency only tells apart what differs by more than its
own noise, so that the same inputs choose the same candidate on the same machine (ADR 0008).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from edgefleet_controller.compile import quality
from edgefleet_controller.compile.port import RECIPE_OPTIONS, Figures, Options, Target
from edgefleet_controller.compile.pruning import Pruned, Tried
from edgefleet_controller.compile.recipe import AS_IS, FLOAT, OWN, PLAIN_TENSORFLOW, TENSORFLOW, Recipe
from edgefleet_controller.manifests import DeviceClassSpec

NOTHING = "nothing fits"
METHODS = ("minmax", "mse", "percentile", "entropy")  # in the order in which they are tried
RUNGS = (0.5, 0.75, 0.9, 0.97)  # shares of the noise that a rung of the ladder takes away by leaving layers in float
RUNGS_AT_LAST = (*RUNGS, 0.99, 0.997)  # where none of those is accurate enough
MOST_ALONE = 2  # units that are rungs by themselves
FLOAT_WEIGHT_COST, HALF_WEIGHT_COST = (
    0.75,
    0.25,
)  # of a float weight's bytes is what keeping it costs, in full or in half precision: int8 keeps a quarter
LEADING = (0.0003, 0.001, 0.003, 0.01, 0.05)  # shares of the weights' bytes that leading layers in float may have
AS_QUIET_DB = 1.0  # candidates whose noise differs by less are told apart by how many answers they change
MOST_BYTES = 1.3  # a rung may grow to so many times the plain candidate
ALIKE = 1.05  # times in time or bytes: candidates that differ by less are told apart by accuracy
MOST_BYTES_AT_LAST = 2.0  # where nothing smaller is accurate enough


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """A layer, or all operators of one kind: its nodes, the noise that int8 in it puts on the outputs (relative to their power), the bytes of its weights in
    float, and of a layer how many values pass from what is up to it to what is behind."""

    nodes: tuple[str, ...]
    kind: str
    noise: float
    weight_bytes: int
    passing: int = 0


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A recipe that was tried, with what was measured of it. ``misses``: the budgets that it misses, each with by how much."""

    recipe: Recipe
    figures: Figures
    misses: tuple[str, ...]
    key: str = ""  # of the compiled model in the cache
    died: bool = False


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate that could not be made, and why. ``lasting``: the network's own fault, so that the same inputs end in it again."""

    recipe: Recipe
    reason: str
    lasting: bool


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What the search ends in. ``chosen`` is None when nothing fits; ``nearest`` is then what came closest. ``why`` is for people."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    nearest: Candidate
    why: str
    sensitivity: tuple[Unit, ...] = ()
    pruning: Pruned | None = None
    left_out: tuple[LeftOut, ...] = ()
    tfmot: Pruned | None = None  # of the Keras network, as ``pruning`` is of its ONNX form


def plain(target: Target, spec: DeviceClassSpec, method: str, options: Options, in_float: Sequence[str]) -> Recipe:
    """The recipe that is tried first: what the manifests say, the rest as experience has it."""
    if spec.precision != "int8":
        return msgspec.structs.replace(FLOAT, precision=spec.precision)
    told: dict[str, Any] = {
        name: options[name] for name in RECIPE_OPTIONS & options.keys() if name in Recipe.__struct_fields__
    }
    return Recipe(ranges=method, in_float=tuple(in_float), **told)


def first(plain: Recipe, target: Target, effort: str) -> list[Recipe]:
    """The first round: ``plain``, and with full effort what may beat it without leaving layers in float."""
    if effort != "full" or plain.precision != "int8" or plain.quantizer == AS_IS:
        return [plain]
    change = msgspec.structs.replace
    others = [change(plain, ranges=m) for m in METHODS if m in target.methods and m != plain.ranges]
    if plain.quantizer == OWN and target.leaves_in_float:
        others.append(change(plain, scope="all" if plain.scope == "weighted" else "weighted"))
    others += [change(plain, quantizer=q) for q in target.quantizers if q not in (plain.quantizer, OWN, TENSORFLOW)]
    return [plain, *others]


def blames_samples(found: Choice) -> bool:
    """Whether nothing was chosen for a fault of the samples, which no other candidate mends."""
    return found.chosen is None and found.why != NOTHING


def by_tensorflow(found: Choice, spec: DeviceClassSpec) -> Recipe | None:
    """What TensorFlow's own converter is asked for after the other candidates: the class's precision, at full effort or where the plain recipe missed
    something; None where that is not worth its minute, or not possible."""
    plain = found.candidates[0]
    wanted = spec.search.effort == "full" or (spec.search.effort == "quick" and plain.misses)
    if not wanted or blames_samples(found) or plain.recipe.quantizer == AS_IS or spec.precision not in ("int8", "fp32"):
        return None
    return msgspec.structs.replace(PLAIN_TENSORFLOW, precision=spec.precision)


def by_layers(
    best: Candidate,
    units: Sequence[Unit],
    most_bytes: float,
    weight_cost: float = FLOAT_WEIGHT_COST,
    shares: Sequence[float] = RUNGS,
) -> list[Recipe]:
    """The ladder: the recipe of ``best`` with ever more of the noisiest units in float, within the bytes.

    A unit that alone makes most of the noise is a rung by itself, and the shares of the others count without it: else the ladder would end
    where that one is gone. A rung that leaves nothing in int8 is none: it would be the float model under another name.

    Args:
        most_bytes: how many times the bytes of ``best`` a rung may have.
        weight_cost: what a weight that stays in float costs, as a share of its float32 bytes.
        shares: of the noise, that rungs take away.
    """
    room = (most_bytes - 1) * best.figures.compiled_bytes
    taken: list[str] = list(best.recipe.in_float)
    open_units = [unit for unit in units if not set(unit.nodes) <= set(taken)]
    total = left = sum(unit.noise for unit in open_units)
    rungs: list[Recipe] = []
    goals, alone = list(shares), 0
    for unit in sorted(open_units, key=lambda u: (-u.noise, u.nodes)):
        cost = unit.weight_bytes * weight_cost
        if cost > room:
            continue
        room -= cost
        taken += [node for node in unit.nodes if node not in taken]
        outlier = alone < MOST_ALONE and unit.noise > left / 2
        left -= unit.noise
        reached = [goal for goal in goals if total and left <= (1 - goal) * total]
        if outlier:
            total, goals, alone = left, list(shares), alone + 1
        else:
            goals = [goal for goal in goals if goal not in reached]
        if outlier or reached:
            rungs.append(msgspec.structs.replace(best.recipe, in_float=tuple(sorted(taken))))
        if not goals:
            break
    else:
        if goals and len(taken) > len(best.recipe.in_float):
            last = msgspec.structs.replace(best.recipe, in_float=tuple(sorted(taken)))
            rungs += [last] if last not in rungs else []
    return [rung for rung in rungs if _rounds(rung, units)]


def _rounds(recipe: Recipe, units: Sequence[Unit]) -> bool:
    """Whether any unit is in int8 by a recipe."""
    in_scope = [unit for unit in units if unit.weight_bytes or recipe.scope == "all"]
    return any(not set(unit.nodes) <= set(recipe.in_float) for unit in in_scope)


def leading(best: Candidate, units: Sequence[Unit]) -> list[Recipe]:
    """The recipe of ``best`` with the leading layers in float, the first alone and then ever more: there pictures are large and weights few, so that they cost
    few bytes, and engines are often slower in int8 (a first layer reads three channels, where their int8 kernels want sixteen). Within each share of the bytes
    they end where fewest values pass, each of which is rounded there."""
    weighted = [unit for unit in units if unit.weight_bytes]
    total = sum(unit.weight_bytes for unit in weighted)
    known = set(best.recipe.in_float)
    rungs, taken, size = dict[float, tuple[int, set[str]]](), set(known), 0
    for number, unit in enumerate(weighted):
        size += unit.weight_bytes
        goal = next((goal for goal in LEADING if size <= goal * total), None)
        if goal is None:
            break
        taken |= set(unit.nodes)
        rung = goal if number else 0.0
        if taken > known and (rung not in rungs or unit.passing <= rungs[rung][0]):
            rungs[rung] = unit.passing, set(taken)
    found = [msgspec.structs.replace(best.recipe, in_float=tuple(sorted(names))) for _, names in rungs.values()]
    return list(dict.fromkeys(found))


def pruned(
    candidates: Sequence[Candidate], steps: Sequence[Tried], spec: DeviceClassSpec, *, by: str = OWN
) -> Recipe | None:
    """The next recipe over a pruned network: the best recipe so far over the sparsest that is not yet tried; None when the last one was accurate
    enough, or none is left.

    Args:
        steps: the good ones, the sparsest last.
        by: TENSORFLOW for networks that tfmot pruned, which its converter alone compiles.
    """
    tfmot = by == TENSORFLOW
    before = [
        candidate
        for candidate in candidates
        if candidate.recipe.pruned and (candidate.recipe.quantizer == TENSORFLOW) == tfmot
    ]
    left = [step for step in steps if step.key not in {candidate.recipe.pruned for candidate in before}]
    if not left or (before and accurate(before[-1], spec)):
        return None
    whole = [
        candidate for candidate in candidates
        if not candidate.recipe.pruned and (candidate.recipe.quantizer == TENSORFLOW) == tfmot and candidate.recipe.precision == spec.precision
    ]  # fmt: skip
    base = choose(whole, spec).chosen or choose(whole, spec).nearest
    return msgspec.structs.replace(base.recipe, pruned=left[-1].key, sparsity=round(left[-1].sparsity, 4))


def accurate(candidate: Candidate, spec: DeviceClassSpec) -> bool:
    """Whether it agrees with the float model as the class wants, and loses no more accuracy than it allows."""
    return not candidate.died and not quality.inaccuracies(candidate.figures, spec.accuracy)


def answers_as_float(candidate: Candidate) -> bool:
    """Whether it gives the float model's answers, but for what engines differ by in float."""
    return candidate.recipe.exact or (candidate.figures.sqnr_db or 0.0) >= quality.AS_FLOAT_DB


def base_of_ladder(candidates: Sequence[Candidate]) -> Candidate:
    """The int8 candidate with the least noise on the outputs, among those whose layers can be left in float; of several with about as little, the one that
    changes fewest answers."""
    possible = [
        t for t in candidates
        if t.recipe.precision == "int8" and not t.recipe.pruned and t.recipe.quantizer != TENSORFLOW and not t.died
    ]  # fmt: skip
    quietest = max(t.figures.sqnr_db or 0.0 for t in possible)
    quiet = [t for t in possible if (t.figures.sqnr_db or 0.0) >= quietest - AS_QUIET_DB]
    return max(quiet, key=lambda t: (t.figures.agreement or 0.0, t.figures.sqnr_db or 0.0))


def float_candidate(measured: Candidate, spec: DeviceClassSpec) -> Candidate:
    """The float model, from what was measured of it beside ``measured``."""
    f = measured.figures
    figures = msgspec.structs.replace(
        f, compiled_bytes=f.float_bytes, wire_bytes=f.float_wire_bytes, agreement=1.0, agreement_low=quality.wilson(f.samples, f.samples)[0], agreement_high=1.0,
        cosine=1.0, sqnr_db=quality.EXACT_DB, p50_ms=f.float_p50_ms, p95_ms=f.float_p95_ms, peak_memory_bytes=None, shares={},
        by_label={}, sqnr_db_by_output={},
    )  # fmt: skip
    return Candidate(recipe=FLOAT, figures=figures, misses=tuple(quality.misses(figures, spec, FLOAT)))


def choose(
    candidates: Sequence[Candidate], spec: DeviceClassSpec, units: Sequence[Unit] = (), fallen: Sequence[Recipe] = ()
) -> Choice:
    """The best candidate that misses no budget, by what the class prefers. Args: ``fallen``: what was tried besides, and is none any more."""
    fitting = [candidate for candidate in candidates if not candidate.misses]
    nearest = max(
        [t for t in candidates if t.recipe.precision == spec.precision] or candidates, key=lambda t: _nearness(t, spec)
    )
    if not fitting:
        return Choice(candidates=tuple(candidates), chosen=None, nearest=nearest, why=NOTHING, sensitivity=tuple(units))
    chosen = _best(_by_their_names(fitting), spec.search.prefer)
    return Choice(
        candidates=tuple(candidates),
        chosen=chosen,
        nearest=nearest,
        why=_why(chosen, candidates, spec, fallen),
        sensitivity=tuple(units),
    )


def _nearness(candidate: Candidate, spec: DeviceClassSpec) -> tuple[bool, bool, float, float, float, float]:
    """How close a candidate comes to the budgets: of those accurate enough the one that is least too large, then least too slow, else the most accurate one.
    Times within the budget, which differ from run to run, don't count."""
    figures, most = candidate.figures, spec.budgets.size_bytes
    good = accurate(candidate, spec)
    too_large = max(1.0, figures.compiled_bytes / most) if good and most is not None else 1.0
    too_slow = max(1.0, (figures.p50_ms or 0.0) / spec.budgets.latency_p95_ms) if good else 1.0
    return not candidate.died, good, -too_large, -too_slow, figures.agreement or 0.0, figures.sqnr_db or 0.0


def without(choice: Choice, fallen: Sequence[Recipe], spec: DeviceClassSpec) -> Choice:
    """The choice when these, measured alone and on all samples, missed a budget after all."""
    left = choose([t for t in choice.candidates if t.recipe not in fallen], spec, choice.sensitivity, fallen)
    return msgspec.structs.replace(left, pruning=choice.pruning, left_out=choice.left_out, tfmot=choice.tfmot)


def gainless(alone: Candidate, choice: Choice, spec: DeviceClassSpec) -> tuple[str, ...]:
    """Why a candidate that was chosen for its speed gives way when it is measured alone, or nothing. Of several that are timed side by side the luckiest
    wins; where in truth it takes as long as float, which fits too, other answers were bought for nothing."""
    time, figures = alone.figures.relative_time, alone.figures
    if spec.search.prefer != "latency" or answers_as_float(alone) or time is None or time <= 1:
        return ()
    if not any(candidate.recipe.exact and not candidate.misses for candidate in choice.candidates):
        return ()
    return (
        f"no faster than float when it is measured alone: p50 {figures.p50_ms:.2f} ms, float {figures.float_p50_ms:.2f}",
    )


def told_of(choice: Choice, candidates: Sequence[Candidate], fallen: Mapping[Recipe, Candidate]) -> Choice:
    """The choice with all that was tried in it, and why those that were better until they were measured alone are not taken.

    Args:
        choice: what was chosen in it is told of as it was measured alone.
        fallen: as they were found then, by recipe.
    """
    last = fallen if choice.chosen is None else {**fallen, choice.chosen.recipe: choice.chosen}
    reasons = [f"not {recipe.told()}, which fits but for this: {', '.join(t.misses)}" for recipe, t in fallen.items()]
    return msgspec.structs.replace(
        choice, candidates=tuple(last.get(t.recipe, t) for t in candidates), why="; ".join([choice.why, *reasons])
    )


def _by_their_names(fitting: Sequence[Candidate]) -> list[Candidate]:
    """Without those that are called int8, answer as float and are no smaller than float that fits too: nothing is rounded in them."""
    least = min((t.figures.compiled_bytes for t in fitting if t.recipe.exact), default=math.inf)

    def named_wrongly(candidate: Candidate) -> bool:
        called = candidate.recipe.precision == "int8" and candidate.recipe.quantizer != AS_IS
        return called and answers_as_float(candidate) and candidate.figures.compiled_bytes >= least

    return [candidate for candidate in fitting if not named_wrongly(candidate)]


def _best(fitting: Sequence[Candidate], prefer: str) -> Candidate:
    def quiet(candidate: Candidate) -> tuple[float, int]:
        return (-(candidate.figures.sqnr_db or 0.0), candidate.figures.compiled_bytes)

    match prefer:
        case "accuracy":
            return min(fitting, key=quiet)
        case "size" | "transfer":
            sizes = {
                t.recipe: t.figures.wire_bytes if prefer == "transfer" else t.figures.compiled_bytes for t in fitting
            }
            least = min(sizes.values())
            return min((t for t in fitting if sizes[t.recipe] <= least * ALIKE), key=quiet)
        case _:
            timed = {candidate.recipe: candidate.figures.relative_time for candidate in fitting}
            known = [time for time in timed.values() if time is not None]
            if not known:  # a class that can't run here: fewest bytes stand for speed, and the board decides
                return _best(fitting, "size")
            fast = [t for t in fitting if (timed[t.recipe] or math.inf) <= min(known) * ALIKE]
            exact = [t for t in fast if answers_as_float(t)]
            if exact:  # nothing gained in time is worth no other answer
                return min(exact, key=lambda t: t.figures.compiled_bytes)
            small = min(t.figures.compiled_bytes for t in fast)
            return min((t for t in fast if t.figures.compiled_bytes <= small * MOST_BYTES), key=quiet)


# Why one that fits was not taken.
_LOSES = {"latency": "not faster", "size": "not smaller", "transfer": "no fewer bytes sent", "accuracy": "not as exact"}


def _why(chosen: Candidate, candidates: Sequence[Candidate], spec: DeviceClassSpec, fallen: Sequence[Recipe]) -> str:
    if chosen.recipe.precision == spec.precision:
        return f"{chosen.recipe.told()}: best of {len(candidates)} tried for {spec.search.prefer}"
    lost = [t for t in candidates if t.recipe.precision == spec.precision]
    if not lost and any(recipe.precision == spec.precision for recipe in fallen):
        return f"{chosen.recipe.precision} is shipped, because no {spec.precision} candidate held at last"
    if not lost:
        return f"{chosen.recipe.precision} is shipped, because {spec.precision} can't be made"
    reasons = "; ".join(f"{t.recipe.told()}: {', '.join(t.misses) or _LOSES[spec.search.prefer]}" for t in lost[:4])
    return f"{chosen.recipe.precision} is shipped, because no {spec.precision} candidate is better here ({reasons})"
