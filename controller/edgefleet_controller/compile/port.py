"""Stage 2, compile: the port that compile targets are adapters of, and what a compile returns.

A target is found through the entry point group ``edgefleet.targets`` and is mostly data: which engine it compiles for,
which toolchain's environment it needs, which module of :mod:`.children` works there, and what it can make.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import NamedTuple, Protocol

import msgspec
from edgefleet_shared.artifact import Descriptor
from edgefleet_shared.errors import ManifestError, ToolchainError, ToolchainUnusable

from edgefleet_controller.compile.environments import Lock, lock_named
from edgefleet_controller.compile.tools import Tool
from edgefleet_controller.manifests import DeviceClass, DeviceClassSpec
from edgefleet_controller.model_version import AcceptanceLimits, ModelVersion, Split

ENTRY_POINTS = "edgefleet.targets"
MAX_BLOB_BYTES = 4 * 1024**3
HOST = "host"  # what timed a candidate, where no builder board did

Options = dict[str, str | int | float | bool]
RECIPE_OPTIONS = frozenset(
    {
        "weights",
        "granularity",
        "scope",
        "correct_bias",
        "fit_weights",
        "fused_activations",
        "gates_in_int8",
        "aligned_channels",
        "quantizer",
        "float_first",
        "activations",
    }
)


class Target(Protocol):
    """What the pipeline asks of a compile target: mostly data, so that nothing need be inherited.

    What can be run here: a compiled model that this host's engine loads is run itself. Where the compile step wrote a *stand-in* beside it
    (the same network for this host's processor, a simulator's input), that is run, its answers count and its times do not.
    """

    name: str
    engine: str  # on the board
    toolchain: str  # the environment's name
    lock: str  # what is in it: requirements with hashes; empty: this build has a lock of that name
    module: str  # of edgefleet_controller.compile.children, or a file's path; run in that toolchain; has the actions compile and measure
    tools: tuple[Tool, ...]  # vendor's programs that the compile step calls
    engine_package: str  # of the toolchain's packages or the vendor's programs the one whose version is the engine's; empty: none here is
    precisions: frozenset[str]
    methods: frozenset[str]  # calibration methods
    quantizers: tuple[str, ...]  # ours, and a toolchain's own; the first is tried first
    reads_qdq: bool  # the compile step takes ONNX, with QDQ too, in which our quantizer writes
    ships_onnx: bool  # the network itself is the compiled model: the engine compiles it when it loads
    measures_onnx: bool  # the action measure takes the float network as ONNX; else it is compiled first
    leaves_in_float: bool  # single layers can stay in float
    halves_weights: (
        bool  # keeps a float16 constant before a Cast: so come all float weights in fp16, and those beside int8
    )
    runs_here: bool  # compiled models, or their stand-ins, can be run on the controller's host
    stand_in: str  # what runs here where it is not the compiled model itself, in words
    providers: tuple[str, ...]  # what may compute on the board, unless the class says otherwise

    def options(self, device_class: DeviceClassSpec, version: ModelVersion) -> Options:
        """Every choice of this target that changes the compiled bytes; part of the cache key.

        Those of :data:`RECIPE_OPTIONS` become part of recipes, the others reach the compile step as they are.

        Raises:
            ManifestError: an option that this target does not know.
        """
        ...


class Share(msgspec.Struct, frozen=True):
    """``count`` of ``of``, with the 95 % Wilson interval of their ratio."""

    value: float
    low: float
    high: float
    count: int
    of: int


WITHIN = "values within tolerance, "  # and the output's name, among the shares of a raw network


def share_title(name: str) -> str:
    """A share's name for people; an output's own name stays as it is."""
    return name if name.startswith(WITHIN) else name.replace("_", " ")


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one compiled model, on this host. ``None``: could not be measured here.

    Agreement is the share of held-out samples with the float model's answer (of boxes, for a detector: the lower of recall and
    precision), with its 95 % Wilson interval; ``shares`` are the other shares of the output's kind by name, and ``accuracy`` and
    ``float_accuracy`` where the samples are labelled; ``by_label`` is what is kept of the labels that are kept worst (:mod:`.by_label`). Times in ms on one thread, float and compiled interleaved in one process on the
    class's engine, on what ``timed_on`` names: ``host``, a builder board, or empty where nobody could; ``wire_bytes`` and
    ``float_wire_bytes``: what is sent of the models; ``sqnr_db`` is the
    signal-to-quantization-noise ratio of the worst output, ``sqnr_db_by_output`` that of each, a detector's by what is in it; memory
    the peak of the process that held engine and model. ``stand_in`` says in words what answered in the compiled model's place, where this
    host could not run that itself; ``unmeasured`` names what the board's acceptance has to decide alone.
    """

    engine: str
    engine_version: str
    float_bytes: int
    compiled_bytes: int
    wire_bytes: int = 0
    float_wire_bytes: int = 0
    samples: int
    agreement: float | None = None
    agreement_low: float | None = None
    agreement_high: float | None = None
    cosine: float | None = None
    sqnr_db: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    float_p50_ms: float | None = None
    float_p95_ms: float | None = None
    peak_memory_bytes: int | None = None
    shares: dict[str, Share] = {}
    by_label: dict[str, Share] = {}
    sqnr_db_by_output: dict[str, float] = {}
    timed_on: str = ""
    unmeasured: tuple[str, ...] = ()
    stand_in: str = ""

    @property
    def relative_time(self) -> float | None:
        """Latency as a share of the float model's in the same process: rounds of a search fall into busy and quiet moments."""
        return None if self.p50_ms is None or not self.float_p50_ms else self.p50_ms / self.float_p50_ms


class CompileResult(msgspec.Struct, frozen=True, kw_only=True):
    """One compiled, judged and packed model.

    ``quality`` is ``passed``, or ``forced`` where it missed what ``misses`` says and was shipped by an explicit flag. ``recipe`` and
    ``why`` tell in words what was chosen, ``cautions`` why the figures prove less than they seem to; ``report`` and ``page`` are the report's blobs, as JSON and as HTML.
    """

    artifact: Descriptor
    model: str
    version: str
    device_class: str
    arch: str
    key: str
    cached: bool
    quality: str
    misses: tuple[str, ...]
    figures: Figures
    seconds: float
    recipe: str = ""
    precision: str = ""
    why: str = ""
    cautions: tuple[str, ...] = ()
    candidates: int = 1
    report: str = ""
    page: str = ""


_NONE = Split(digest="", count=0)
_NO_MODEL = ModelVersion(  # has no options of its own
    schema=0, model="", version="", network="", inputs=(), outputs=(), output_kind="raw", encoding=None, labels=(),
    calibration=_NONE, calibration_method="minmax", holdout=_NONE, golden=_NONE,
    acceptance=AcceptanceLimits(min_agreement=0.0, min_cosine=0.0, tolerance_abs=0.0, tolerance_rel=0.0, min_golden=0),
)  # fmt: skip


def target_named(name: str) -> Target:
    """The installed compile target of that name.

    Raises:
        ToolchainUnusable: there is none, or it can't be imported, or lacks something of :class:`Target`.
    """
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in found:
        raise ToolchainUnusable(
            f"no target {name} installed; have: {', '.join(sorted(found)) or 'none'}",
            hint="install a package that offers it, or build this class elsewhere (spec.build)",
        )
    hint = (
        "install the version of its package that is for this edgefleet, or remove it; docs/guides/writing-a-target.md"
    )
    try:
        made: Target = found[name].load()()
    except Exception as exc:  # a stranger's code, which may raise anything
        raise ToolchainUnusable(
            f"the target {name} is installed but broken: {type(exc).__name__}: {exc}", hint=hint
        ) from exc
    lacking = [part for part in (*Target.__annotations__, "options") if not hasattr(made, part)]
    if lacking:
        raise ToolchainUnusable(f"the target {name} is installed but broken: it has no {', '.join(lacking)}", hint=hint)
    if made.name != name:
        raise ToolchainUnusable(
            f"the target {name} is installed but broken: it calls itself {made.name!r}, unlike its entry point",
            hint=hint,
        )
    return made


def check_class(device_class: DeviceClass, target: Target) -> None:
    """Hold what a class asks for against its target, whatever the model.

    Raises:
        ManifestError: the target makes it for another engine, not in that precision, or does not know an option.
    """
    spec, name = device_class.spec, device_class.name
    if spec.engine != target.engine:
        raise ManifestError(f"{name}: target {target.name} compiles for engine {target.engine}, not {spec.engine}")
    if spec.precision not in target.precisions:
        raise ManifestError(
            f"{name}: target {target.name} makes no {spec.precision}; it makes {', '.join(sorted(target.precisions))}"
        )
    try:
        target.options(spec, _NO_MODEL)
    except ManifestError as exc:
        raise ManifestError(f"{name}: {exc.message}", hint=exc.hint) from exc


class Installed(NamedTuple):
    """Every installed target by name, and why each that is broken can't be used."""

    targets: dict[str, Target]
    broken: dict[str, str]


def installed_targets() -> Installed:
    """What there is: one that is broken keeps no other from being used."""
    found = Installed({}, {})
    for name in sorted({entry.name for entry in entry_points(group=ENTRY_POINTS)}):
        try:
            found.targets[name] = target_named(name)
        except ToolchainUnusable as exc:
            found.broken[name] = str(exc)
    return found


def engine_version(target: Target, packages: Mapping[str, str], tools: Mapping[str, str]) -> str:
    """The version of what compiles for the target's engine, as it is installed; nothing where no such thing is here.

    Raises:
        ToolchainError: there is neither a package nor a program of the name that the target gives.
    """
    known = {**packages, **tools}
    if target.engine_package and target.engine_package not in known:
        raise ToolchainError(
            f"the target {target.name} is broken: its engine_package {target.engine_package!r} is no package of the toolchain "
            f"{target.toolchain} and none of its programs",
            hint=f"it has: {', '.join(sorted(known))}",
        )
    return known.get(target.engine_package, "")


def lock_of(target: Target) -> Lock:
    """What the target's environment is made from.

    Raises:
        ToolchainError: neither the target nor this build has its lock.
    """
    return Lock(target.toolchain, target.lock) if target.lock else lock_named(target.toolchain)


def chosen_options(target: str, device_class: DeviceClassSpec, version: ModelVersion, defaults: Options) -> Options:
    """A target's options: its defaults, over them the class's ``options``, over them the model's named ``<target>.<option>``.

    Raises:
        ManifestError: an option that the target does not know, or of another type than its default.
    """
    prefix = f"{target}."
    own = {key.removeprefix(prefix): value for key, value in version.options.items() if key.startswith(prefix)}
    chosen = dict(defaults)
    for name, value in (*device_class.options.items(), *own.items()):
        if name not in defaults:
            raise ManifestError(
                f"target {target} has no option {name!r}; it has: {', '.join(sorted(defaults)) or 'none'}"
            )
        if type(value) is not type(defaults[name]):
            raise ManifestError(
                f"option {name!r} of target {target} is {value!r}, expected {type(defaults[name]).__name__}"
            )
        chosen[name] = value
    return chosen


def quantizing_options(device_class: DeviceClassSpec) -> Options:
    """The options, with their defaults, of every target that quantizes by :class:`~.recipe.Recipe`.

    ``weights``, ``granularity``, ``scope``, ``correct_bias`` and ``fit_weights`` are the recipe's; ``float_first``: so many leading convolutions stay in float.
    """
    weights = "pairs" if overflows(device_class) else "full"
    return {
        "weights": weights, "granularity": "channel", "scope": "all", "correct_bias": True, "fit_weights": True, "float_first": 0,
    }  # fmt: skip


def overflows(device_class: DeviceClassSpec) -> bool:
    """Whether int8 kernels on the class may overflow with 8-bit weights: x86 without VNNI adds pairs of u8 * s8 products in 16
    bits, which saturate (MobileNetV3 lost 5 points of accuracy on such CPUs)."""
    return device_class.arch == "x86_64" and not any("vnni" in feature for feature in device_class.cpu_features)
