"""Stage 2, compile: the steps. Receives a version, a target and recipes, hands on files and figures; each step is a child process.

::

    prepare     simplified network, float answers to held-out and golden samples   once per network and samples
    form        pruned networks as onnxruntime is fast at them (prepare: the whole)  once per network
    statistics  ranges and means of activations                                    once per network and calibration
    rank        noise that int8 in each layer puts on the outputs                   once per statistics
    prune       smaller networks, one per step (:mod:`.pruner`)                     once per network, training samples and step
    compile     compiled models, one per recipe                                    once per recipe, target and toolchain
    run         outputs and times of compiled models, or of what stands in          always anew

What is made once is cached under a key over all that decides its bytes: network, samples, recipe, toolchain locks, and the code that
makes it. Two classes with the same key (LiteRT on x86 and on Arm) share it; two jobs that want it at one time wait for one another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from edgefleet_shared import golden
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import ToolchainError
from safetensors.numpy import load, load_file

from edgefleet_controller.compile import originals, quality, writing
from edgefleet_controller.compile.cache import Cache, content_key
from edgefleet_controller.compile.port import (
    MAX_BLOB_BYTES,
    RECIPE_OPTIONS,
    Options,
    Target,
)
from edgefleet_controller.compile.recipe import AS_IS, FLOAT, HALF, OWN, TENSORFLOW, Recipe
from edgefleet_controller.compile.search import Unit
from edgefleet_controller.compile.toolchains import Toolchain, Toolchains
from edgefleet_controller.compile.watching import TimeUp
from edgefleet_controller.manifests import DeviceClass
from edgefleet_controller.model_version import ModelVersion, Split

Progress = Callable[[str, int, int], None]

PREPARE = ("onnxruntime", "ort")  # toolchain and module that simplify, answer in float, gather statistics and write QDQ
FORMED = "formed.onnx"  # in the cache, the network in another form
COMPILED = "compiled"  # file of a compiled model in the cache
STAND_IN = "stand-in"  # beside it, what this host runs in its place
MOST_CALIBRATION = 512  # samples that ranges are taken from: each costs time in every gathering and compiling
LIMITED_SAMPLES = 1000  # that a time limit is for; more get more
RANKED_SAMPLES = 6  # of the calibration set; a layer's noise differs between samples much less than between layers
_CHILDREN = Path(__file__).parent / "children"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How long each child may take, in seconds; where it answers more than :data:`LIMITED_SAMPLES` samples, in proportion longer."""

    prepare_s: float = 600.0
    prune_s: float = 4 * 3600.0  # each step; it trains
    compile_s: float = 1800.0
    measure_s: float = 600.0


class Steps:
    """The steps of one compile, over one temporary folder ``work``."""

    def __init__(
        self, version: ModelVersion, device_class: DeviceClass, target: Target, options: Options, toolchain: Toolchain,
        layout: Layout, toolchains: Toolchains, cache: Path, work: Path, progress: Progress, limits: Limits,
    ) -> None:  # fmt: skip
        self._version, self._class_name, self._target, self._toolchain = version, device_class.name, target, toolchain
        self._layout, self._toolchains = layout, toolchains
        self._cache = Cache(cache, toolchains.raise_if_cancelled)
        self._work, self._progress, self._limits = work, progress, limits
        self._preparing = toolchains.ensure(PREPARE[0], progress)
        self._holdout: dict[str, Any] | None = None
        self._logged: set[Path] = set()
        self._options = {name: value for name, value in sorted(options.items()) if name not in RECIPE_OPTIONS}
        self._told = {  # to the target's own children
            "options": self._options,
            "inputs": [spec.name for spec in version.inputs],
            "outputs": [spec.name for spec in version.outputs],
            "output_shapes": [list(spec.shape) for spec in version.outputs],
        }
        code = _code()
        own = (version.network, self._preparing.lock_hash, code, _json(version.encoding))
        self._prepared_key = content_key("prepare", *own, version.holdout.digest, version.golden.digest)
        self._gathered_key = content_key("statistics", *own, version.calibration.digest, MOST_CALIBRATION)
        # A target from elsewhere has its child in a file of its own.
        own_code = hashlib.sha256(Path(target.module).read_bytes()).hexdigest() if target.module.endswith(".py") else ""
        self._target_key = (target.name, toolchain.lock_hash, code + own_code, self._options)

    def toolchains_of(self, recipe: Recipe) -> tuple[Toolchain, ...]:
        """Those that make a compiled model by the recipe."""
        more = (self.toolchain(originals.TOOLCHAIN),) if recipe.quantizer == TENSORFLOW else ()
        return (self._toolchain, *more)

    # -- for what works over the same cache and folder: pruning, the check of the input --------------------------------

    @property
    def layout(self) -> Layout:
        return self._layout

    @property
    def work(self) -> Path:
        """A folder that is gone when the compile is over."""
        return self._work

    @property
    def prepared_key(self) -> str:
        """Of the simplified network and what it was asked: changes with the network and with the code of the children."""
        return self._prepared_key

    def toolchain(self, name: str) -> Toolchain:
        return self._toolchains.ensure(name, self._progress)

    def once(self, kind: str, key: str, fill: Callable[[Path], None]) -> Path:
        """The cache's folder of that kind and key, filled if it is not there."""
        return self._cache.once(kind, key, fill)

    def prune(
        self, toolchain: Toolchain, module: str, request: dict[str, Any], memory_bytes: int | None
    ) -> dict[str, Any]:
        return self._child(toolchain, module, self._limits.prune_s, {"action": "prune", **request}, memory_bytes)

    def answer(self, network: Path, samples: Path, count: int, outputs: Path) -> None:
        """Write what a float network answers to the first ``count`` samples (encoded, safetensors)."""
        self._child(self._preparing, PREPARE[1], _in_proportion(self._limits.measure_s, count), {
            "action": "measure", "models": [{"model": str(network), "outputs": str(outputs)}], "float_model": None,
            "samples": str(samples), "count": count,
        })  # fmt: skip

    def key(self, recipe: Recipe) -> str:
        """Of a compiled model in the cache."""
        # A float model does not depend on the calibration; its network and toolchains are in the other keys.
        data = (
            self._gathered_key if recipe.precision == "int8" else self._version.network
        )  # a pruned network's key is in its recipe
        own = originals.key(self._version) if recipe.quantizer == TENSORFLOW else ()
        own = (self._version.as_is,) if recipe.quantizer == AS_IS else own
        return content_key("compile", data, self._preparing.lock_hash, recipe.as_dict(), *self._target_key, *own)

    def prepare(self) -> Path:
        """Folder with ``simplified.onnx``, :data:`FORMED` where onnxruntime is faster at another form, and the float model's answers: ``holdout.safetensors``,
        ``golden.safetensors``."""
        version = self._version

        def fill(staged: Path) -> None:
            limit_s = _in_proportion(self._limits.prepare_s, version.holdout.count + version.golden.count)
            self._child(self._preparing, PREPARE[1], limit_s, {
                "action": "prepare",
                "network": str(self._layout.checked_path(version.network)),
                "simplified": str(staged / "simplified.onnx"),
                "formed": str(staged / FORMED),
                "samples": [self.samples(version.holdout), self.samples(version.golden)],
                "references": [str(staged / "holdout.safetensors"), str(staged / "golden.safetensors")],
            })  # fmt: skip

        return self._cache.once("prepared", self._prepared_key, fill)

    def simplified(self, pruned: str = "") -> Path:
        """The network in float: as it came, or as pruning left it (the key of a pruned one in the cache)."""
        return self._cache.path("pruned", pruned) / "network.onnx" if pruned else self.prepare() / "simplified.onnx"

    def formed(self, pruned: str = "") -> Path:
        """The network in float as the target's engine is fast at it."""
        simplified = self.simplified(pruned)
        if not self._formed():
            return simplified
        if not pruned:
            return self.prepare() / FORMED

        def fill(staged: Path) -> None:
            self._child(self._preparing, PREPARE[1], self._limits.prepare_s, {
                "action": "form", "network": str(simplified), "formed": str(staged / FORMED),
            })  # fmt: skip

        formed = self._cache.once("formed", content_key("form", pruned, _code()), fill) / FORMED
        return formed if formed.exists() else simplified

    def _formed(self) -> bool:
        return self._target.ships_onnx and (self.prepare() / FORMED).exists()

    def references(self, count: int | None = None) -> dict[str, Any]:
        """The float model's outputs for the (first ``count``) held-out samples, by name."""
        if self._holdout is None:
            self._holdout = load_file(self.prepare() / "holdout.safetensors")
        return {name: array[:count] for name, array in self._holdout.items()}

    def rank(self, recipe: Recipe) -> list[Unit]:
        """Noise of every layer, with the ranges and weights of a recipe."""
        asked = {
            name: getattr(recipe, name)
            for name in ("ranges", "weights", "granularity", "correct_bias", "fit_weights", "fused_activations")
        }
        with_makers = not self._target.reads_qdq  # in QDQ an int8 operator can write float
        parts = [part.told() for part in quality.parts(self._version).values()]

        def fill(staged: Path) -> None:
            found = self._child(self._preparing, PREPARE[1], self._limits.compile_s, {
                "action": "rank",
                "simplified": str(self.formed()),
                "statistics": self._statistics("", [recipe]),
                "samples": self.calibration(),
                "count": RANKED_SAMPLES,
                "recipe": asked,
                "parts": parts,
                "with_makers": with_makers,
            })  # fmt: skip
            (staged / "units.json").write_text(json.dumps(found["units"]))

        folder = self._cache.once("ranked", content_key("rank", self._gathered(""), asked, parts, with_makers), fill)
        return msgspec.json.decode((folder / "units.json").read_bytes(), type=list[Unit])

    def compile(self, recipes: Sequence[Recipe]) -> list[tuple[Path, bool]]:
        """(file, whether it was cached) of each recipe."""
        keys = [self.key(recipe) for recipe in recipes]
        cached = [self._cache.path("compiled", key).is_dir() for key in keys]
        folders = self._cache.all("compiled", dict(zip(keys, recipes, strict=True)), self._compile)
        return [(folders[key] / COMPILED, known) for key, known in zip(keys, cached, strict=True)]

    def run(
        self, models: Mapping[Path, Path], split: Split, count: int, *, float_model: Path | None = None, memory_bytes: int | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """Have compiled models, or what stands in for them, answer the first ``count`` samples of a split, each into a file.

        Returns:
            Of the process its peak of memory; with a float model the times of all, in turns with it.
        Raises:
            ChildDied: the process did; EngineFailed: the engine refused a model, or failed over it.
        """
        limit_s = _in_proportion(self._limits.measure_s, count)
        return self._child(self._toolchain, self._target.module, limit_s, {
            "action": "measure",
            "models": [{"model": str(_runnable(path)), "outputs": str(file)} for path, file in models.items()],
            "float_model": None if float_model is None else str(_runnable(float_model)),
            "samples": self.samples(split),
            "count": count,
            **self._told,
        }, memory_bytes)  # fmt: skip

    def float_model(self) -> Path:
        """The float model as this host measures it."""
        return self.formed() if self._target.measures_onnx else self.compiled_float()[1]

    def compiled_float(self) -> tuple[Recipe, Path]:
        """The float model as the class's engine runs it; in half precision where there is no other."""
        half = FLOAT.precision not in self._target.precisions and HALF.precision in self._target.precisions
        recipe = HALF if half else FLOAT
        ((path, _),) = self.compile([recipe])
        return recipe, path

    def calibration(self) -> str:
        """As :meth:`samples`, those of the calibration samples that ranges are taken from."""
        split = self._version.calibration
        return self.samples(split, calibrating(split.count))

    def samples(self, split: Split, rows: Sequence[int] | None = None) -> str:
        """A split, or some rows of it, as the network takes it (float32, encoded), as a file in the work folder."""
        some = rows is not None and len(rows) < split.count
        path = self._work / f"{split.digest.rpartition(':')[2]}{'-some' if some else ''}.safetensors"
        if not path.exists():
            tensors = load(self._layout.read(split.digest, MAX_BLOB_BYTES))
            if some:
                tensors = {name: array[list(rows or ())] for name, array in tensors.items()}
            encoding = self._version.encoding
            if encoding is not None:
                # Tensors that came encoded (float) stay as they are; stored pictures are uint8.
                tensors = {
                    k: golden.encode_pictures(a, encoding) if a.dtype == "uint8" else a for k, a in tensors.items()
                }
            writing.write_tensors(tensors, path)
        return str(path)

    # -- one step each -------------------------------------------------------------------------------------------------

    def _gathered(self, pruned: str) -> str:
        """Key of what calibration tells of a network."""
        key = content_key(self._gathered_key, pruned) if pruned else self._gathered_key
        return content_key(key, FORMED) if self._formed() else key

    def _statistics(self, pruned: str, recipes: Sequence[Recipe]) -> str:
        """The file that :mod:`.children.statistics` writes; without histograms where no recipe needs them, in half the time."""
        histograms = any(recipe.needs_histograms for recipe in recipes)
        whole = self._cache.path("statistics", content_key(self._gathered(pruned), True))

        def fill(staged: Path) -> None:
            self._child(self._preparing, PREPARE[1], self._limits.compile_s, {
                "action": "gather",
                "simplified": str(self.formed(pruned)),
                "calibration": self.calibration(),
                "statistics": str(staged / "statistics.json"),
                "histograms": histograms,
            })  # fmt: skip

        histograms = histograms or whole.is_dir()
        key = content_key(self._gathered(pruned), histograms)
        return str(self._cache.once("statistics", key, fill) / "statistics.json")

    def _quantized(self, pruned: str, recipes: Sequence[Recipe]) -> dict[Recipe, Path]:
        """QDQ networks by recipe: the same for every target that reads them."""
        data = self._gathered(pruned)
        keys = {recipe: content_key("quantize", data, recipe.as_dict()) for recipe in recipes}

        def fill(wanted: dict[Path, Recipe]) -> None:
            self._child(self._preparing, PREPARE[1], self._limits.compile_s, {
                "action": "quantize",
                "simplified": str(self.formed(pruned)),
                "statistics": self._statistics(pruned, list(wanted.values())),
                "jobs": [{"recipe": r.as_dict(), "quantized": str(s / "network.onnx")} for s, r in wanted.items()],
            })  # fmt: skip

        folders = self._cache.all("quantized", {key: recipe for recipe, key in keys.items()}, fill)
        return {recipe: folders[key] / "network.onnx" for recipe, key in keys.items()}

    def _halved(self, pruned: str, networks: dict[Recipe, Path]) -> dict[Recipe, Path]:
        """These networks with their float weights in half precision: the same for every target that takes them so."""
        data = self._gathered(pruned)
        keys = {recipe: content_key("halve", data, recipe.as_dict()) for recipe in networks}

        def fill(wanted: dict[Path, Recipe]) -> None:
            self._child(self._preparing, PREPARE[1], self._limits.compile_s, {
                "action": "halve",
                "jobs": [{"network": str(networks[r]), "halved": str(s / "network.onnx")} for s, r in wanted.items()],
            })  # fmt: skip

        folders = self._cache.all("halved", {key: recipe for recipe, key in keys.items()}, fill)
        return {recipe: folders[key] / "network.onnx" for recipe, key in keys.items()}

    def _compile(self, wanted: dict[Path, Recipe]) -> None:
        """Compile into staged folders, one network after the other."""
        for pruned in dict.fromkeys(recipe.pruned for recipe in wanted.values()):
            self._compile_one(pruned, {staged: r for staged, r in wanted.items() if r.pruned == pruned})

    def _compile_one(self, pruned: str, wanted: dict[Path, Recipe]) -> None:
        for staged in [staged for staged, recipe in wanted.items() if recipe.quantizer == AS_IS]:
            writing.put(self._layout.checked_path(self._version.as_is), staged / COMPILED)
            del wanted[staged]
        by_tensorflow = {staged: recipe for staged, recipe in wanted.items() if recipe.quantizer == TENSORFLOW}
        if by_tensorflow:
            folder = self.simplified(pruned).parent if pruned else None
            jobs = {staged / COMPILED: recipe for staged, recipe in by_tensorflow.items()}
            self._child(self.toolchain(originals.TOOLCHAIN), originals.MODULE, self._limits.compile_s, {
                **originals.request(self._version, self._layout, folder, jobs),
                "calibration": self.calibration(),
            }, originals.MEMORY_BYTES)  # fmt: skip
        wanted = {staged: recipe for staged, recipe in wanted.items() if staged not in by_tensorflow}
        if not wanted:
            return
        simplified = self.formed(pruned)
        int8 = [r for r in wanted.values() if r.precision == "int8" and r.quantizer == OWN]
        quantized = self._quantized(pruned, int8) if self._target.reads_qdq and int8 else {}
        networks = {staged: quantized.get(recipe, simplified) for staged, recipe in wanted.items()}
        if self._target.halves_weights and self._target.reads_qdq:
            halved = self._halved(
                pruned, {r: networks[staged] for staged, r in wanted.items() if _has_float_weights(r)}
            )
            networks |= {staged: halved[recipe] for staged, recipe in wanted.items() if recipe in halved}
        if self._target.ships_onnx:
            for staged, network in networks.items():
                writing.put(network, staged / COMPILED)
            return
        self._child(self._toolchain, self._target.module, self._limits.compile_s, {
            "action": "compile",
            "simplified": str(simplified),
            "calibration": self.calibration(),
            "statistics": self._statistics(pruned, int8) if int8 and not self._target.reads_qdq else None,
            **self._told,
            "jobs": [
                {"recipe": wanted[s].as_dict(), "network": str(network), "compiled": str(s / COMPILED), "stand_in": str(s / STAND_IN)}
                for s, network in networks.items()
            ],
        })  # fmt: skip
        for staged in wanted:
            if not (staged / COMPILED).is_file() or (staged / COMPILED).stat().st_size == 0:
                raise ToolchainError(
                    f"the {self._toolchain.name} compile ended well, but wrote no compiled model",
                    hint=f"see {self._log('compile')}",
                )

    def _child(
        self, toolchain: Toolchain, module: str, limit_s: float, request: dict[str, Any], memory_bytes: int | None = None
    ) -> dict[str, Any]:  # fmt: skip
        log = self._log(request["action"])
        if log not in self._logged:  # an earlier compile's; this one's own jobs follow each other in it
            self._logged.add(log)
            log.unlink(missing_ok=True)
        try:
            return self._toolchains.run(
                toolchain, module, request, self._work, log, limit_s=limit_s, memory_bytes=memory_bytes, progress=self._progress
            )  # fmt: skip
        except TimeUp as exc:
            samples = len(calibrating(self._version.calibration.count)), self._version.holdout.count
            fewer = f"fewer samples take less time: it has {samples[0]} to calibrate with, {samples[1]} are held out"
            raise TimeUp(exc.message, hint=f"{exc.hint}; {fewer}") from exc

    def _log(self, action: str) -> Path:
        name = f"{self._version.model}-{self._version.version}-{self._class_name}-{action}.log"
        return self._cache.folder / "logs" / name


def calibrating(count: int) -> list[int]:
    """Which of so many calibration samples ranges are taken from: all, or :data:`MOST_CALIBRATION` from the first to the last, evenly spread, as they may
    lie in order of their classes."""
    taken = min(count, MOST_CALIBRATION)
    return [round(place * (count - 1) / max(taken - 1, 1)) for place in range(taken)]


def _in_proportion(limit_s: float, count: int) -> float:
    return limit_s * max(1.0, count / LIMITED_SAMPLES)


def _has_float_weights(recipe: Recipe) -> bool:
    """Whether half precision is asked for, or weights of our own int8 stay in float."""
    return recipe.precision == HALF.precision or (recipe.quantizer == OWN and bool(recipe.in_float))


def stands_in(compiled: Path) -> bool:
    """Whether this host runs something else in place of a compiled model."""
    return (compiled.parent / STAND_IN).exists()


def _runnable(compiled: Path) -> Path:
    return compiled.parent / STAND_IN if stands_in(compiled) else compiled


def _code() -> str:
    """Hash over the children's code: a better recipe is another key. All modules, as they import each other."""
    state = hashlib.sha256()
    for path in sorted(_CHILDREN.rglob("*.py")):
        state.update(str(path.relative_to(_CHILDREN)).encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def _json(value: Any) -> str:
    return msgspec.json.encode(value, order="deterministic").decode()
