"""Stage 2, compile: the search carried out. Receives what :mod:`.search` wants tried, hands on the choice and what it was measured by.

What was decided is cached like what was compiled, because times, and with them a close choice, differ from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import onnx
from edgefleet_shared import answers, atomic, detection, segmentation
from edgefleet_shared.errors import EnvironmentProblem, ModelError, ToolchainError
from edgefleet_shared.malformed import MALFORMED
from safetensors.numpy import load_file

from edgefleet_controller.compile import by_label, originals, pruning, quality, search
from edgefleet_controller.compile.cache import content_key
from edgefleet_controller.compile.environments import lock_named
from edgefleet_controller.compile.evaluator import Evaluator, Measured
from edgefleet_controller.compile.host import host
from edgefleet_controller.compile.keras_pruner import KerasPruner
from edgefleet_controller.compile.packing import contract
from edgefleet_controller.compile.port import HOST, Options, Target
from edgefleet_controller.compile.pruner import TOOLCHAIN as PRUNING_TOOLCHAIN
from edgefleet_controller.compile.pruner import Pruner
from edgefleet_controller.compile.pruning import Pruned
from edgefleet_controller.compile.recipe import AS_IS, CAME, FLOAT, HALF, OWN, PLAIN_TENSORFLOW, TENSORFLOW, Recipe
from edgefleet_controller.compile.search import Candidate, Choice, LeftOut, Unit
from edgefleet_controller.compile.steps import Steps
from edgefleet_controller.compile.watching import Cancelled, ChildDied, ChildKilled, EngineFailed
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.model_version import ModelVersion


class Finder:
    """Carries out the search's rounds, and measures what it chose."""

    def __init__(
        self, steps: Steps, evaluator: Evaluator, version: ModelVersion, device_class: DeviceClass, target: Target, options: Options
    ) -> None:  # fmt: skip
        self._steps, self._evaluator = steps, evaluator
        self._version, self._class, self._target, self._options = version, device_class, target, options
        self._fresh: dict[Recipe, Measured] = {}
        self._made: set[Recipe] = set()  # compiled now, not found in the cache

    def choice(self, cache: Path) -> Choice:
        """What the search ends in; from the cache where the same was searched on a machine like this."""
        spec = self._class.spec
        plain = self._plain()
        judged_by = (
            spec.arch, spec.precision, spec.accuracy.model_dump(), spec.budgets.model_dump(),
            spec.search.model_dump(), spec.measure_on, self._evaluator.has_builder,
        )  # fmt: skip
        # Another rule for choosing, or another measure, is another search.
        files = (
            __file__,
            *(module.__file__ for module in (search, quality, answers, by_label, detection, segmentation, pruning)),
        )
        rules = [Path(str(file)).read_text(encoding="utf-8") for file in files]
        # Pruned networks are made by a toolchain that the recipe's key does not know.
        pruner = lock_named(PRUNING_TOOLCHAIN).hash if self._version.pruning is not None else ""
        own = originals.key(self._version) if originals.offered(self._target, self._version) else ()
        key = content_key(
            "search", self._steps.key(plain), self._version.digest, *judged_by, host(), rules, pruner, own
        )
        file = cache / "searched" / f"{key}.json"
        known = _known(file)
        if known and all(self._steps.simplified(candidate.recipe.pruned).exists() for candidate in known.candidates):
            return known
        found = self._search(plain)
        passing = any(not one.lasting for one in found.left_out)
        died = any(candidate.died for candidate in found.candidates)  # it may have been the machine's fault
        unanswered = self._evaluator.has_builder and any(
            "latency" in candidate.figures.unmeasured for candidate in found.candidates
        )
        if not (unanswered or passing or died):
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_shared(file, msgspec.json.encode(found))
        return found

    def final(self, choice: Choice) -> tuple[Choice, Measured, bool]:
        """(the choice, what was chosen or came closest measured alone, whether it was compiled before).

        Measured alone, on all samples, a candidate at the edge may miss a budget after all, be no faster than float, or be one that boards would refuse:
        then the next best is taken.
        """
        left, fallen = choice, dict[Recipe, Candidate]()
        while left.chosen is not None:
            measured, cached = self._alone(left.chosen.recipe)
            refusals = self._refusals(measured)
            misses = (*measured.candidate.misses, *refusals) or search.gainless(
                measured.candidate, left, self._class.spec
            )
            if not misses:
                last = msgspec.structs.replace(left, chosen=measured.candidate)
                return search.told_of(last, choice.candidates, fallen), measured, cached
            fallen[left.chosen.recipe] = msgspec.structs.replace(measured.candidate, misses=misses)
            if refusals and self._unclimbed(choice, left.chosen.recipe):
                choice = self._with_layers(choice)
            if len(fallen) == len(choice.candidates):
                choice = self._with_float(choice)
            if len(fallen) == len(choice.candidates):
                break
            left = search.without(choice, list(fallen), self._class.spec)
            if _in_float(left):
                choice = self._with_half(choice)
                left = search.without(choice, list(fallen), self._class.spec)
        measured, cached = self._alone(choice.nearest.recipe)
        misses = (*measured.candidate.misses, *self._refusals(measured))
        measured = measured._replace(candidate=msgspec.structs.replace(measured.candidate, misses=misses))
        why = search.NOTHING if fallen else choice.why
        return msgspec.structs.replace(choice, chosen=None, why=why), measured, cached

    def _refusals(self, measured: Measured) -> list[str]:
        """What boards would refuse a candidate for. A builder board has said so itself."""
        if not measured.outputs or measured.candidate.figures.timed_on not in ("", HOST):
            return []
        ((path, _),) = self._steps.compile([measured.candidate.recipe])
        try:
            held_to = contract(self._version, self._class, self._target)
            return quality.refusals(*self._evaluator.golden(path), held_to, self._version.reading)
        except ChildKilled:
            raise  # by this machine, for want of memory
        except (ChildDied, EngineFailed) as exc:
            return [f"{exc.ended} over the golden samples: {exc.how}"]

    def _unclimbed(self, choice: Choice, refused: Recipe) -> bool:
        """Whether layers in float, which a quick search did not look for, may keep boards from refusing it."""
        ours = refused.precision == "int8" and refused.quantizer == OWN and not refused.pruned
        quick = self._class.spec.search.effort == "quick" and not choice.sensitivity
        return ours and quick and self._target.leaves_in_float and self._target.runs_here

    def _with_layers(self, choice: Choice) -> Choice:
        """The choice with the first ladder over its plain candidate tried."""
        best = search.base_of_ladder(choice.candidates)
        units = self._steps.rank(best.recipe)
        rungs = search.by_layers(best, units, search.MOST_BYTES, self._cost())
        candidates = (*choice.candidates, *self._try(rungs, known=choice.candidates))
        return msgspec.structs.replace(choice, candidates=candidates, sensitivity=tuple(units))

    def _cost(self) -> float:
        """Of a weight that stays in float, as a share of its float32 bytes."""
        return search.HALF_WEIGHT_COST if self._target.halves_weights else search.FLOAT_WEIGHT_COST

    def _alone(self, recipe: Recipe) -> tuple[Measured, bool]:
        ((path, cached),) = self._steps.compile([recipe])
        cached = cached and recipe not in self._made
        fresh = self._fresh.get(recipe)
        if fresh is not None and (fresh.candidate.figures.peak_memory_bytes is not None or fresh.candidate.died):
            return fresh, cached
        return self._evaluator.measure([(recipe, path)])[0], cached

    def _plain(self) -> Recipe:
        if self._version.as_is_engine == "tflite" and self._comes_as_wanted():
            return CAME
        wanted = int(self._options.get("float_first", 0))
        names = _convolutions(self._steps.prepare() / "simplified.onnx")[:wanted] if wanted else []
        return search.plain(self._target, self._class.spec, self._version.calibration_method, self._options, names)

    def _comes_as_wanted(self) -> bool:
        """Whether the file that it came as is one for the class."""
        is_its_own = bool(self._version.as_is) and self._version.as_is_engine == self._target.engine
        return is_its_own and self._class.spec.precision == "int8"

    def _search(self, plain: Recipe) -> Choice:
        found, spec = self._with_tensorflows(self._with_what_came(self._unpruned(plain))), self._class.spec
        if not any(candidate.recipe.precision == spec.precision for candidate in found.candidates):
            return msgspec.structs.replace(found, why=f"{found.why}: {found.left_out[0].reason}")
        if self._version.pruning is None or not spec.search.pruned or not self._target.runs_here:
            return found
        accurate = {t.recipe.quantizer == TENSORFLOW for t in found.candidates if search.accurate(t, spec)}
        if False in accurate:
            found = self._with_pruned(found)
        return self._with_tfmots(found) if True in accurate else found

    def _with_pruned(self, found: Choice) -> Choice:
        """The search over pruned networks too: from the sparsest that was good back to one that holds in the class's precision. One that is unfit for
        pruning is told as that, and judged whole."""
        try:
            pruned = Pruner(self._steps, self._version, self._class).run()
        except ModelError as exc:
            plan = self._version.pruning
            assert plan is not None
            gone = 1 - (1 - plan.structured) * (1 - plan.unstructured)
            asked = msgspec.structs.replace(found.candidates[0].recipe, pruned="asked for", sparsity=gone)
            left = LeftOut(recipe=asked, reason=str(exc), lasting=True)
            return msgspec.structs.replace(
                found, left_out=(*found.left_out, left), why=f"{found.why}; nothing is pruned: {exc.message}"
            )
        return msgspec.structs.replace(self._over(found, pruned, OWN), pruning=pruned)

    def _over(self, found: Choice, pruned: Pruned, by: str) -> Choice:
        """The choice with candidates over networks that were pruned for ``by``."""
        spec, candidates = self._class.spec, list(found.candidates)
        while (recipe := search.pruned(candidates, pruned.good, spec, by=by)) is not None:
            candidates += self._try([recipe])
        choice = search.choose(candidates, spec, found.sensitivity)
        told = (choice.why, found.pruning.stopped if found.pruning is not None else "", pruned.stopped)
        return msgspec.structs.replace(
            choice, pruning=found.pruning, left_out=found.left_out, why="; ".join(one for one in told if one)
        )

    def _with_what_came(self, found: Choice) -> Choice:
        """The search with the file that it came as: who trained it with roundings has trained it for these. A .tflite is the plain candidate already."""
        wanted = self._comes_as_wanted() and self._target.runs_here and self._class.spec.search.effort != "fixed"
        known = found.candidates[0].recipe == CAME or search.blames_samples(found)
        return self._with(found, CAME) if wanted and not known else found

    def _with_tensorflows(self, found: Choice) -> Choice:
        """The search with the candidate of TensorFlow's own converter."""
        if not originals.offered(self._target, self._version) or not self._target.runs_here:
            return found
        recipe = search.by_tensorflow(found, self._class.spec)
        return found if recipe is None else self._with(found, recipe)

    def _with(self, found: Choice, recipe: Recipe) -> Choice:
        """The search with one candidate more."""

        def more() -> Choice:
            chosen = search.choose([*found.candidates, *self._try([recipe])], self._class.spec, found.sensitivity)
            return msgspec.structs.replace(chosen, left_out=found.left_out)

        return _sparing(found, recipe, more)

    def _with_tfmots(self, found: Choice) -> Choice:
        """The search over networks that tfmot pruned."""
        plan, precision = self._version.pruning, self._class.spec.precision
        assert plan is not None
        told = msgspec.structs.replace(
            PLAIN_TENSORFLOW, precision=precision, pruned="tfmot", sparsity=plan.unstructured
        )

        def over() -> Choice:
            pruned = KerasPruner(self._steps, self._version, self._class).run()
            return msgspec.structs.replace(self._over(found, pruned, TENSORFLOW), tfmot=pruned)

        return _sparing(found, told, over)

    def _unpruned(self, plain: Recipe) -> Choice:
        effort = self._class.spec.search.effort
        if not self._target.runs_here and effort != "fixed":
            # Candidates that can't be told apart are not made: a builder board tells those in float from the plain one; else boards' acceptance judges that.
            effort = "quick" if self._evaluator.has_builder else "fixed"
        candidates, left_out = self._first(plain, effort)
        choice = self._better_than(candidates, plain, effort)
        return msgspec.structs.replace(choice, left_out=(*left_out, *choice.left_out))

    def _first(self, plain: Recipe, effort: str) -> tuple[list[Candidate], tuple[LeftOut, ...]]:
        """The first round, and what of it could not be made: another quantizer, or int8 at all, which leaves the float model."""
        recipes = search.first(plain, self._target, effort)
        left_out = []
        try:
            candidates = self._try([recipe for recipe in recipes if recipe.quantizer == plain.quantizer])
        except ModelError as exc:
            if plain.precision != "int8" or effort == "fixed" or FLOAT.precision not in self._target.precisions:
                raise
            # What that raises is the network's own fault; int8's may be of an operator that rounding added.
            return self._try([FLOAT]), (LeftOut(recipe=plain, reason=str(exc), lasting=True),)
        for recipe in recipes:
            if recipe.quantizer == plain.quantizer:
                continue
            try:
                candidates += self._try([recipe])
            except Cancelled:
                raise
            except (ModelError, ToolchainError) as exc:
                left_out.append(LeftOut(recipe=recipe, reason=str(exc), lasting=isinstance(exc, ModelError)))
        return candidates, tuple(left_out)

    def _better_than(self, candidates: list[Candidate], plain: Recipe, effort: str) -> Choice:
        """The choice after the first round and those that follow from it."""
        spec = self._class.spec
        made = candidates[0].recipe.precision == plain.precision
        if plain.precision != "int8" or effort == "fixed" or not made:
            choice = search.choose(candidates, spec)
            return choice if choice.chosen else self._with_float(choice)
        if all(candidate.died for candidate in candidates):  # and nothing was measured of the float model beside them
            more = [FLOAT] if FLOAT.precision in self._target.precisions else []
            return search.choose(candidates + self._try(more), spec)
        # Nothing else can be made of what came quantized; and what fits may still be no better than float, which was measured beside it.
        if plain.quantizer == AS_IS or (effort == "quick" and not candidates[0].misses):
            return self._or_in_half(candidates + self._in_float(candidates))
        if not any(search.accurate(candidate, spec) for candidate in candidates):
            reason = self._unlike()
            if reason:  # layers in float would hide it
                return msgspec.structs.replace(search.choose(candidates, spec), chosen=None, why=reason)
        units: list[Unit] = []
        if self._target.leaves_in_float and (effort == "full" or not search.accurate(candidates[0], spec)):
            best = search.base_of_ladder(candidates)
            units = self._steps.rank(best.recipe)
            rungs = search.by_layers(best, units, search.MOST_BYTES, self._cost())
            rungs += search.leading(best, units) if effort == "full" else []
            candidates += self._try(rungs, known=candidates)
            if not self._holds(candidates):
                rungs = search.by_layers(best, units, search.MOST_BYTES_AT_LAST, self._cost(), search.RUNGS_AT_LAST)
                candidates += self._try(rungs, known=candidates)
                self._holds(candidates)
        if HALF.precision in self._target.precisions and (
            effort == "full" or all(candidate.misses for candidate in candidates)
        ):
            candidates += self._try([HALF])
        return self._or_in_half(candidates + self._in_float(candidates), units)

    def _or_in_half(self, candidates: list[Candidate], units: Sequence[Unit] = ()) -> Choice:
        """The choice among these; where that is the float model, also among half precision, in which a network may answer the same in half the bytes."""
        choice = search.choose(candidates, self._class.spec, units)
        return self._with_half(choice) if _in_float(choice) else choice

    def _with_float(self, choice: Choice) -> Choice:
        """The choice with the float model, where that was no candidate yet: a class of half precision falls back to it as one of int8 does."""
        spec, tried = self._class.spec, {candidate.recipe for candidate in choice.candidates}
        if spec.search.effort == "fixed" or FLOAT in tried or all(candidate.died for candidate in choice.candidates):
            return choice
        more = msgspec.structs.replace(choice, candidates=(*choice.candidates, *self._in_float(choice.candidates)))
        return search.without(more, (), spec)

    def _with_half(self, choice: Choice) -> Choice:
        """The choice with half precision tried, where the target makes it."""
        known = {candidate.recipe for candidate in choice.candidates} | {one.recipe for one in choice.left_out}
        if HALF in known or HALF.precision not in self._target.precisions:
            return choice

        def more() -> Choice:
            candidates = (*choice.candidates, *self._try([HALF]))
            return search.without(msgspec.structs.replace(choice, candidates=candidates), (), self._class.spec)

        return _sparing(choice, HALF, more)

    def _try(self, recipes: Sequence[Recipe], known: Sequence[Candidate] = ()) -> list[Candidate]:
        """Compile and measure one round."""
        wanted = [r for r in dict.fromkeys(recipes) if r not in {candidate.recipe for candidate in known}]
        if not wanted:
            return []
        made = self._steps.compile(wanted)
        self._made |= {recipe for recipe, (_, cached) in zip(wanted, made, strict=True) if not cached}
        measured = self._evaluator.measure([(recipe, path) for recipe, (path, _) in zip(wanted, made, strict=True)])
        self._fresh |= {one.candidate.recipe: one for one in measured}
        return [one.candidate for one in measured]

    def _holds(self, candidates: list[Candidate]) -> bool:
        """Whether one of these is accurate on all held-out samples. A round looks at some of them: who is so there is judged anew here, in place."""
        spec = self._class.spec
        for candidate in sorted(candidates, key=lambda t: t.figures.sqnr_db or 0.0, reverse=True):
            if not search.accurate(candidate, spec):
                continue
            if candidate.figures.samples < self._version.holdout.count:
                alone, _ = self._alone(candidate.recipe)
                candidates[candidates.index(candidate)] = alone.candidate
                self._fresh[candidate.recipe] = alone
                candidate = alone.candidate
            if search.accurate(candidate, spec):
                return True
        return False

    def _in_float(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The float model as a candidate, where the target makes it."""
        if FLOAT.precision not in self._target.precisions:
            return []
        return [search.float_candidate(next(t for t in candidates if not t.died), self._class.spec)]

    def _unlike(self) -> str:
        calibration = load_file(self._steps.calibration())
        holdout = load_file(self._steps.samples(self._version.holdout))
        return quality.unlike(calibration, holdout)


def _known(file: Path) -> Choice | None:
    """What an earlier search ended in; None where there was none, or nothing that can be read is left of it."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Choice)
    except (FileNotFoundError, *MALFORMED):
        return None


def _in_float(choice: Choice) -> bool:
    """Whether what was chosen is the float model."""
    return choice.chosen is not None and choice.chosen.recipe == FLOAT


def _sparing(found: Choice, recipe: Recipe, more: Callable[[], Choice]) -> Choice:
    """The choice with ``more``; where that can't be had, the one that was ``found``, in which the recipe is told as left out."""
    try:
        return more()
    except Cancelled:
        raise
    except (ModelError, ToolchainError, EnvironmentProblem) as exc:
        left = LeftOut(recipe=recipe, reason=str(exc), lasting=isinstance(exc, ModelError))
        return msgspec.structs.replace(found, left_out=(*found.left_out, left))


def _convolutions(path: Path) -> list[str]:
    """Names of the convolutions, in order."""
    return [node.name for node in onnx.load(path).graph.node if node.op_type == "Conv"]
