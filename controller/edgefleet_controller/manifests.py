"""Stage 1, source: what operators write, as validated values. Reading them from files is :mod:`edgefleet_controller.manifest_files`.

A file holds one or several documents of the form ``apiVersion, kind, metadata, spec``. Kinds: :class:`DeviceClass` (what
to compile for), :class:`Model` (one version of one network, with its pictures), :class:`Rollout` (who gets it, in which
waves, held by which gate), :class:`Site`. Unknown fields are errors, numbers are not strings, and nothing is guessed.
The published JSON schemas (``docs/generated/schemas``) come from :func:`json_schemas`. Times in s or ms, memory in bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from edgefleet_shared.contract import MAX_ACCEPTANCE_S, MAX_BUILD_S
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

API_VERSION: Literal["edgefleet/v1"] = "edgefleet/v1"

Name = Annotated[
    str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$", description="lower case, digits, '-', '.'")
]
Version = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,62}$")]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Milliseconds = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(gt=0)]
Decoder = Literal["yolov3", "yolov5", "yolov8", "yolox", "boxes"]


class _Strict(BaseModel):
    # JSON, in which all of it is kept and signed, has no infinity.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Metadata(_Strict):
    name: Name
    labels: dict[str, str] = {}


class ManifestBase(_Strict):
    """What all kinds share. ``file`` is where it was read from; relative paths inside are relative to that file's folder."""

    apiVersion: Literal["edgefleet/v1"] = API_VERSION  # the name is Kubernetes', on purpose
    metadata: Metadata
    _file: Path | None = PrivateAttr(default=None)

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def file(self) -> Path | None:
        return self._file


# --- device class ----------------------------------------------------------------------------------------------------


class Budgets(_Strict):
    """What a compiled model may cost on a board of the class."""

    latency_p95_ms: Milliseconds
    memory_bytes: Bytes = Field(description="peak of the process that holds engine and model")
    size_bytes: Bytes | None = Field(default=None, description="of the compiled model")
    power_watts: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="mean of the whole board while it infers; judged on boards that measure their power"
    )


class Accuracy(_Strict):
    """``min_agreement``: smallest share of held-out pictures with the float model's answer (of boxes, for a detector: both recall and
    precision). ``max_loss``: how much less accurate than the float model it may be, where the held-out pictures are labelled."""

    min_agreement: Share = 0.9
    max_loss: Annotated[float, Field(ge=0, lt=1)] | None = None


class Search(_Strict):
    """How hard the compiler looks for the best artifact. ``fixed``: what the manifests say, pass or fail. ``quick``: that, and more only
    when it misses a budget. ``full``: every candidate that makes sense. ``prefer``: what is best among those within all budgets;
    only ``size`` and ``transfer`` (fewest bytes sent) let a candidate win that is slower than float. ``pruned``: whether networks that the model's
    ``prune`` made are among them."""

    effort: Literal["fixed", "quick", "full"] = "full"
    prefer: Literal["latency", "size", "transfer", "accuracy"] = "latency"
    pruned: bool = True


class AcceptanceOverrides(_Strict):
    """What the board must show, where the class knows better than the defaults."""

    min_agreement: Share | None = Field(default=None, description="on the golden pictures; default: the model's")
    min_cosine: Annotated[float, Field(ge=0, le=1)] | None = None
    allowed_providers: list[str] | None = Field(default=None, min_length=1, description="default: the target's own")
    max_celsius: Annotated[float, Field(gt=0, le=125)] | None = None
    min_golden: Count | None = None
    warmup_runs: Count = 5
    timed_runs: Annotated[int, Field(ge=10)] = 40
    time_limit_s: Annotated[float, Field(gt=0, le=MAX_ACCEPTANCE_S)] = 120.0


class Shadow(_Strict):
    """On the board, after acceptance and before it may serve, the candidate answers live requests too, unseen. A rollout's ``timeout_s``
    must leave time for it. Where nothing serves yet, or memory does not hold both, there is none, and the report says so."""

    requests: Count = Field(description="live requests to compare")
    min_agreement: Share = Field(default=0.95, description="of them answered like what serves")
    max_latency_ratio: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="median of the engine's time against what serves"
    )
    time_limit_s: Annotated[float, Field(gt=0)] = 300.0


class BuildBudget(_Strict):
    """What making a plan may cost on a board of the class, where the engine needs one (tensorrt). A rollout's ``timeout_s`` must leave time
    for it."""

    time_limit_s: Annotated[float, Field(gt=0, le=MAX_BUILD_S)] = 900.0
    memory_bytes: Bytes = Field(default=2 << 30, description="resident, of the process that builds")
    disk_bytes: Bytes = Field(default=1 << 30, description="of the plan")


class Power(_Strict):
    """How fast the processor may run while a board of the class serves; applied on the board, undone when nothing asks for it."""

    governor: str | None = Field(default=None, pattern=r"^[a-z_]{1,32}$", description="cpufreq's, such as powersave")
    max_clock_mhz: Annotated[int, Field(ge=1, le=100_000)] | None = None


class DeviceClassSpec(_Strict):
    arch: Literal["x86_64", "aarch64", "armv7l", "riscv64"]
    cpu_features: list[str] = Field(default=[], description="kernel names that every board of the class has")
    engine: Name
    engine_version: str = Field(default="", pattern=r"^((>=|<=|==|!=|>|<)\s*[0-9][0-9A-Za-z.+-]*(\s*,\s*|$))*$")
    target: Name | None = Field(default=None, description="compile target; default: the one named like the engine")
    precision: Literal["int8", "fp16", "fp32"] = Field(
        default="int8", description="the lowest; where nothing in it fits, a search ships the float model if that does"
    )
    budgets: Budgets
    accuracy: Accuracy = Accuracy()
    search: Search = Search()
    acceptance: AcceptanceOverrides = AcceptanceOverrides()
    swap: Literal["auto", "blue-green", "in-place"] = "auto"
    shadow: Shadow | None = None
    power: Power = Power()
    build: Literal["controller", "builder", "board"] = "controller"
    build_budget: BuildBudget = BuildBudget()
    measure_on: Literal["auto", "builder"] = Field(
        default="auto",
        description="where candidates are timed: auto is the compiling host if it could be a board of the class, else a builder board; "
        "builder is a builder board always. Where there is none they stay unmeasured, and the boards' acceptance decides",
    )
    options: dict[str, str | int | float | bool] = Field(default={}, description="for the compile target")
    proven: str = Field(
        default="", description="how far this class was proven, in words; fleet apply and fleet class show them"
    )


class DeviceClass(ManifestBase):
    kind: Literal["DeviceClass"]
    spec: DeviceClassSpec

    @property
    def target(self) -> str:
        return self.spec.target or self.spec.engine


# --- model -----------------------------------------------------------------------------------------------------------


class Source(_Strict):
    """Where the network comes from: a file, or an importer that knows a published one."""

    path: str | None = Field(
        default=None, description="an ONNX file, a .tflite, a .keras or .h5 file, or the folder of a SavedModel"
    )
    importer: Name | None = None

    @model_validator(mode="after")
    def _one(self) -> Source:
        if (self.path is None) == (self.importer is None):
            raise ValueError("give either path or importer")
        return self


class PictureInput(_Strict):
    """How a picture becomes an input: fitted to the input's size, then ``(u8 - mean) / std``.

    ``fit``: ``crop`` scales the shortest side to ``resize`` and crops the centre; ``letterbox`` scales the picture whole into the middle
    and fills the rest with ``fill``; ``left`` does so from the upper left corner (lines of text); ``stretch`` ignores proportions.
    """

    name: str
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    colour: Literal["RGB", "BGR", "GREY"] = "RGB"
    fit: Literal["crop", "letterbox", "left", "stretch"] = "crop"
    fill: Annotated[int, Field(ge=0, le=255)] = 128
    resize: Count | None = Field(
        default=None, description="shortest side in pixels before the crop; default: crop size / 0.875"
    )
    mean: list[float] = [0.0]
    std: list[Annotated[float, Field(gt=0)]] = [1.0]

    @model_validator(mode="after")
    def _channels(self) -> PictureInput:
        allowed = {1} if self.colour == "GREY" else {1, 3}
        if len(self.mean) not in allowed or len(self.std) not in allowed:
            raise ValueError("mean and std have one value per channel, or one for all")
        return self


class Detection(_Strict):
    """How outputs become boxes, as the application does it; x before y, width before height, all in pixels of the input.

    ``yolov3``: one output per scale, batch x anchors * (5 + classes) x rows x columns, before any sigmoid, with ``anchors`` (width, height in
    pixels) and ``masks`` (their numbers) per output. ``yolov5`` (also v6, v7): one output, batch x N x (5 + classes): centre, sides, objectness,
    scores. ``yolov8`` (and later): one output, batch x (4 + classes) x N: centre, sides, scores. ``yolox``: as yolov5, in cells of grids of these
    ``strides``. ``boxes``: two outputs, boxes (batch x N x 4: left, top, right, bottom) and scores (batch x N x classes)."""

    decoder: Decoder
    anchors: list[Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)]] = []
    masks: list[list[Annotated[int, Field(ge=0)]]] = []
    strides: list[Count] = Field(default=[8, 16, 32], description="yolox only")
    relative: bool = Field(
        default=False, description="yolov5, yolov8 and boxes: in shares of the input's sides, as TFLite exports have it"
    )
    threshold: Share = Field(default=0.25, description="least score of a box that the application reports")
    nms_iou: Share = Field(
        default=0.45, description="overlap above which the lesser of two boxes of a class is dropped"
    )
    match_iou: Share = Field(default=0.5, description="overlap from which two boxes count as the same")

    @model_validator(mode="after")
    def _anchored(self) -> Detection:
        if self.decoder == "yolov3" and not (self.anchors and self.masks):
            raise ValueError("decoder yolov3 needs anchors and masks")
        if any(number >= len(self.anchors) for mask in self.masks for number in mask):
            raise ValueError("masks name anchors by their place, from 0")
        if self.relative and self.decoder in ("yolov3", "yolox"):
            raise ValueError(f"decoder {self.decoder} has no relative coordinates")
        return self


class Text(_Strict):
    """How an output (batch x steps x classes) becomes a line, greedily by CTC. Class 0 is the blank; the others are the lines of
    ``characters``, then a space if ``space``."""

    characters: str = Field(description="text file, one character a line")
    space: bool = True


class Segmentation(_Strict):
    """How an output becomes a class for each pixel. Scores of several classes: the largest is the answer. One channel, or none: a pixel is in the mask
    above ``threshold``, as the application has it. Whole numbers (a network that ends in ArgMax) are answers already."""

    layout: Literal["NCHW", "NHWC"] = "NCHW"
    threshold: float | None = Field(default=None, description="of a mask of one channel, in the output's own unit")


class Output(_Strict):
    """``classification``: the largest of the last axis is the answer; ``detection``: boxes; ``text``: a line, spaces included;
    ``segmentation``: a class for each pixel; ``raw``: values are compared within a tolerance."""

    kind: Literal["classification", "detection", "text", "segmentation", "raw"] = "classification"
    labels: str | None = Field(default=None, description="text file, one label a line, in the order of the outputs")
    detection: Detection | None = None
    text: Text | None = None
    segmentation: Segmentation | None = Field(
        default=None, description="default: the largest of axis 1 is each pixel's answer"
    )

    @model_validator(mode="after")
    def _described(self) -> Output:
        for kind, given in (("detection", self.detection), ("text", self.text)):
            if (self.kind == kind) != (given is not None):
                raise ValueError(f"output kind {kind} and output.{kind} go together")
        if self.segmentation is not None and self.kind != "segmentation":
            raise ValueError("output.segmentation goes with output kind segmentation")
        return self


class Pictures(_Strict):
    """A folder of pictures; a ``.safetensors`` file of one tensor per input, first axis the samples (as the network takes it, or uint8
    pictures in the input's size); or a Python function that yields such samples one by one, run in a process of its own."""

    path: str | None = None
    entry: str | None = Field(
        default=None, pattern=r"^[^:]+\.py:[A-Za-z_][A-Za-z0-9_]*$", description="file.py:function, which takes nothing"
    )
    count: Count | None = Field(default=None, description="how many to take, in order of name; default: all")

    @model_validator(mode="after")
    def _one(self) -> Pictures:
        if (self.path is None) == (self.entry is None):
            raise ValueError("give either path or entry")
        return self


class Calibration(Pictures):
    method: Literal["minmax", "percentile", "entropy", "mse"] = "minmax"


class Holdout(Pictures):
    truth: str | None = Field(
        default=None,
        description="text file with the right answer of each sample, one a line, in order of name: a class's number or label, or the text",
    )


class Training(Pictures):
    truth: str | None = Field(
        default=None,
        description="text file with the class of each sample, one a line, in order of name: its number or label",
    )


class Pruning(_Strict):
    """Gradual pruning, as variants that the quality search may choose: a step takes some weights, then the network is tuned to answer as the float
    one does, and where labelled samples are given, right. A class whose accuracy budget does not come back gets the last step that was good.

    ``structured``: whole channels go; the network gets smaller and faster. ``unstructured``: single weights become zero; it gets smaller in
    transfer only. With both, each step takes channels first.
    """

    structured: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="share of the weights that go")
    unstructured: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="share of those left")
    steps: Annotated[int, Field(ge=1, le=32)] = Field(default=4, description="by a cubic schedule: the first take most")
    epochs: Count = Field(default=4, description="after each step; as many again where the accuracy is not back")
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    batch: Count = 64
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    max_loss: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="accuracy that a step may lose on training samples set aside, where labelled; default: the class's. The float network may have "
        "been trained on these very samples, and then knows them better than any other network: give it room. Held-out samples judge in the end",
    )
    training: Training | None = Field(default=None, description="default: the calibration samples, without labels")

    @model_validator(mode="after")
    def _something(self) -> Pruning:
        if not (self.structured or self.unstructured):
            raise ValueError("give structured or unstructured, the share of the weights to prune")
        return self


class OutputTolerance(_Strict):
    """How far the values of one output may lie from the float model's: ``tolerance_abs + tolerance_rel * |value|``."""

    tolerance_abs: Annotated[float, Field(ge=0)] = 0.0
    tolerance_rel: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _some(self) -> OutputTolerance:
        if not (self.tolerance_abs or self.tolerance_rel):
            raise ValueError("give tolerance_abs or tolerance_rel")
        return self


class ModelAcceptance(_Strict):
    """What every board must show on the golden pictures. ``tolerance_*`` are for all output kinds but ``classification``: a board
    compares values, it decodes no boxes and no text."""

    min_agreement: Share = 0.9
    min_cosine: Annotated[float, Field(ge=0, le=1)] = 0.9
    tolerance_abs: Annotated[float, Field(ge=0)] = 0.0
    tolerance_rel: Annotated[float, Field(ge=0)] = 0.0
    outputs: dict[str, OutputTolerance] = Field(
        default={}, description="by the output's name, where one tolerance does not suit all: a score beside pixels"
    )
    min_golden: Count = 8


class ModelSpec(_Strict):
    version: Version
    source: Source
    sizes: dict[str, Count] = Field(
        default={}, description="sizes of the dimensions that the network leaves open, by name"
    )
    inputs: list[PictureInput] = Field(
        default=[], max_length=1, description="empty: inputs are tensors, given as .safetensors"
    )
    output: Output = Output()
    calibration: Calibration
    holdout: Holdout
    golden: Pictures
    acceptance: ModelAcceptance = ModelAcceptance()
    prune: Pruning | None = None
    options: dict[str, str | int | float | bool] = Field(default={}, description="for the compile targets")

    @model_validator(mode="after")
    def _tolerance(self) -> ModelSpec:
        limits = self.acceptance
        kind = self.output.kind
        if kind != "classification" and not (limits.tolerance_abs or limits.tolerance_rel):
            raise ValueError(f"output kind {kind} needs acceptance.tolerance_abs or acceptance.tolerance_rel")
        if limits.outputs and kind == "classification":
            raise ValueError("acceptance.outputs goes with output kinds that are compared by their values")
        if self.holdout.truth is not None and kind not in ("classification", "text"):
            raise ValueError(f"holdout.truth has no form for output kind {kind}")
        training = self.prune.training if self.prune is not None else None
        if training is not None and training.truth is not None and kind != "classification":
            raise ValueError(f"prune.training.truth has no form for output kind {kind}")
        return self


class Model(ManifestBase):
    kind: Literal["Model"]
    spec: ModelSpec


# --- rollout ---------------------------------------------------------------------------------------------------------


class Selector(_Strict):
    """Which boards. Fields narrow each other; within one field any value fits. All empty: every enrolled board."""

    classes: list[Name] = []
    sites: list[Name] = []
    devices: list[Name] = []
    labels: dict[str, str] = {}


class Wave(_Strict):
    """How many boards take part in this wave, counted over the whole rollout so far and per device class."""

    name: Name
    per_class: Count | None = Field(default=None, description="boards of each class")
    count: Count | None = Field(default=None, description="boards over all classes")
    percent: Annotated[int, Field(ge=1, le=100)] | None = Field(
        default=None, description="of the boards of each class, rounded up"
    )
    devices: list[Name] | None = Field(default=None, min_length=1, description="these boards")

    @model_validator(mode="after")
    def _one(self) -> Wave:
        if sum(v is not None for v in (self.per_class, self.count, self.percent, self.devices)) != 1:
            raise ValueError("give exactly one of per_class, count, percent, devices")
        return self


class Gate(_Strict):
    """When a wave may be followed by the next, judged per device class. Zero measurements never pass."""

    min_sample: Count = Field(default=1, description="boards of the class that must have ended")
    max_failed_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_error_rate: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.01, description="failed requests while soaking"
    )
    max_latency_ratio: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="p95 against the class's baseline"
    )
    max_drift: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="population stability index of what the version sees and says against its golden set; above 0.25 much has moved",
    )


class RolloutSpec(_Strict):
    model: Name
    version: Version
    selector: Selector = Selector()
    waves: list[Wave] = Field(
        default=[Wave(name="canary", per_class=1), Wave(name="half", percent=50), Wave(name="all", percent=100)],
        min_length=1,
    )
    soak_s: Seconds = Field(default=60.0, description="how long a board watches a new model before it commits")
    timeout_s: Annotated[float, Field(gt=0)] = Field(default=900.0, description="per board, from assignment to outcome")
    reach_window_s: Annotated[float, Field(gt=0)] = Field(
        default=300.0, description="a board not seen for so long is unreached"
    )
    max_in_flight: Count | None = Field(default=None, description="boards that change at one time")
    gate: Gate = Gate()

    @field_validator("waves")
    @classmethod
    def _distinct(cls, waves: list[Wave]) -> list[Wave]:
        names = [wave.name for wave in waves]
        if len(set(names)) != len(names):
            raise ValueError("two waves have the same name")
        return waves


class Rollout(ManifestBase):
    kind: Literal["Rollout"]
    spec: RolloutSpec


# --- site ------------------------------------------------------------------------------------------------------------


class SiteSpec(_Strict):
    timezone: str = Field(default="UTC", description="IANA name; maintenance windows are in site time")
    description: str = ""
    connectivity: Literal["online", "intermittent", "offline"] = "online"

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError) as exc:
            raise ValueError(f"{value!r} is no time zone of the IANA database, such as Europe/Berlin") from exc
        return value


class Site(ManifestBase):
    kind: Literal["Site"]
    spec: SiteSpec


# --- all kinds ---------------------------------------------------------------------------------------------------------

Manifest = DeviceClass | Model | Rollout | Site
KINDS: dict[str, type[DeviceClass] | type[Model] | type[Rollout] | type[Site]] = {
    "DeviceClass": DeviceClass,
    "Model": Model,
    "Rollout": Rollout,
    "Site": Site,
}


def json_schemas() -> dict[str, dict[str, Any]]:
    """The JSON schema of every kind, by kind."""
    return {
        kind: {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
        for kind, model in KINDS.items()
    }
