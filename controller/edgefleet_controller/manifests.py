"""Stage 1, source: what operators write. Receives YAML files, hands on validated manifests, or an error with file and line.

A file holds one or several documents of the form ``apiVersion, kind, metadata, spec``. Kinds: :class:`DeviceClass` (what
to compile for), :class:`Model` (one version of one network, with its pictures), :class:`Rollout` (who gets it, in which
waves, held by which gate), :class:`Site`. Unknown fields are errors, numbers are not strings, and nothing is guessed.
The published JSON schemas (``docs/generated/schemas``) come from :func:`json_schemas`. Times in s or ms, memory in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from edgefleet_shared.errors import ManifestError
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from edgefleet_controller.yaml_lines import Document, FieldPath, read_documents

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


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


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
    """``min_agreement``: smallest share of held-out pictures with the float model's answer."""

    min_agreement: Share = 0.9


class AcceptanceOverrides(_Strict):
    """What the board must show, where the class knows better than the defaults."""

    min_agreement: Share | None = Field(default=None, description="on the golden pictures; default: the model's")
    min_cosine: Annotated[float, Field(ge=0, le=1)] | None = None
    allowed_providers: list[str] | None = Field(default=None, min_length=1, description="default: the target's own")
    max_celsius: Annotated[float, Field(gt=0, le=125)] | None = None
    min_golden: Count | None = None
    warmup_runs: Count = 5
    timed_runs: Annotated[int, Field(ge=10)] = 40
    time_limit_s: Annotated[float, Field(gt=0)] = 120.0


class Shadow(_Strict):
    """On the board, after acceptance and before it may serve, the candidate answers live requests too, unseen. A rollout's ``timeout_s``
    must leave time for it. Where nothing serves yet, or memory does not hold both, there is none, and the report says so."""

    requests: Count = Field(description="live requests to compare")
    min_agreement: Share = Field(default=0.95, description="of them answered like what serves")
    max_latency_ratio: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="median of the engine's time against what serves"
    )
    time_limit_s: Annotated[float, Field(gt=0)] = 300.0


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
    precision: Literal["int8", "fp16", "fp32"] = "int8"
    budgets: Budgets
    accuracy: Accuracy = Accuracy()
    acceptance: AcceptanceOverrides = AcceptanceOverrides()
    swap: Literal["auto", "blue-green", "in-place"] = "auto"
    shadow: Shadow | None = None
    power: Power = Power()
    build: Literal["controller", "builder", "board"] = "controller"
    options: dict[str, str | int | float | bool] = Field(default={}, description="for the compile target")
    proven: str = Field(default="", description="how far this class was proven, in words")


class DeviceClass(ManifestBase):
    kind: Literal["DeviceClass"]
    spec: DeviceClassSpec

    @property
    def target(self) -> str:
        return self.spec.target or self.spec.engine


# --- model -----------------------------------------------------------------------------------------------------------


class Source(_Strict):
    """Where the network comes from: a file, or an importer that knows a published one."""

    path: str | None = Field(default=None, description="an ONNX file")
    importer: Name | None = None

    @model_validator(mode="after")
    def _one(self) -> Source:
        if (self.path is None) == (self.importer is None):
            raise ValueError("give either path or importer")
        return self


class PictureInput(_Strict):
    """How a picture becomes an input: shortest side to ``resize``, centre crop to the input's size, ``(u8 - mean) / std``."""

    name: str
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    colour: Literal["RGB", "BGR", "GREY"] = "RGB"
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


class Output(_Strict):
    """``classification``: the largest of the last axis is the answer; ``raw``: values are compared within a tolerance."""

    kind: Literal["classification", "raw"] = "classification"
    labels: str | None = Field(default=None, description="text file, one label a line, in the order of the outputs")


class Pictures(_Strict):
    """A folder of pictures, or a ``.safetensors`` file of input tensors (float, already encoded; first axis the samples)."""

    path: str
    count: Count | None = Field(default=None, description="how many to take, in order of name; default: all")


class Calibration(Pictures):
    method: Literal["minmax", "percentile", "entropy"] = "minmax"


class ModelAcceptance(_Strict):
    """What every board must show on the golden pictures. ``tolerance_*`` are for ``kind: raw``."""

    min_agreement: Share = 0.9
    min_cosine: Annotated[float, Field(ge=0, le=1)] = 0.9
    tolerance_abs: Annotated[float, Field(ge=0)] = 0.0
    tolerance_rel: Annotated[float, Field(ge=0)] = 0.0
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
    holdout: Pictures
    golden: Pictures
    acceptance: ModelAcceptance = ModelAcceptance()
    options: dict[str, str | int | float | bool] = Field(default={}, description="for the compile targets")

    @model_validator(mode="after")
    def _tolerance(self) -> ModelSpec:
        limits = self.acceptance
        if self.output.kind == "raw" and not (limits.tolerance_abs or limits.tolerance_rel):
            raise ValueError("output kind raw needs acceptance.tolerance_abs or acceptance.tolerance_rel")
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


# --- reading ---------------------------------------------------------------------------------------------------------

Manifest = DeviceClass | Model | Rollout | Site
KINDS: dict[str, type[DeviceClass] | type[Model] | type[Rollout] | type[Site]] = {
    "DeviceClass": DeviceClass,
    "Model": Model,
    "Rollout": Rollout,
    "Site": Site,
}
SUFFIXES = (".yaml", ".yml")
M = TypeVar("M", bound=ManifestBase)


def load_manifests(path: Path) -> list[Manifest]:
    """Every manifest in a file, or in all YAML files of a folder and its folders, in order of path.

    Raises:
        ManifestError: with file, line, field and what was expected; also when nothing is there, or two have one name.
    """
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    elif path.exists():
        files = [path]
    else:
        raise ManifestError(f"no such file or folder: {path}")
    found: list[Manifest] = []
    seen: dict[tuple[str, str, str], Document] = {}
    for document in (d for file in files for d in read_documents(file)):
        manifest = parse(document)
        version = manifest.spec.version if isinstance(manifest, Model) else ""
        key = (manifest.kind, manifest.name, version)
        if key in seen:
            first = seen[key]
            raise document.error(
                ("metadata", "name"),
                f"{manifest.kind} {manifest.name!r} is already in {first.file}, line {first.line(('metadata', 'name'))}",
            )
        seen[key] = document
        found.append(manifest)
    if not found:
        raise ManifestError(f"no manifest in {path}", hint="manifests are .yaml or .yml files")
    return found


def of_kind(manifests: Sequence[Manifest], kind: type[M]) -> list[M]:
    """The manifests of one kind."""
    return [m for m in manifests if isinstance(m, kind)]


def parse(document: Document) -> Manifest:
    """Validate one document.

    Raises:
        ManifestError: every wrong field, each with its line.
    """
    value = document.value
    if not isinstance(value, dict):
        raise document.error((), "a manifest is a mapping with apiVersion, kind, metadata and spec")
    if "apiVersion" not in value or value["apiVersion"] != API_VERSION:
        raise document.error(("apiVersion",), f"expected {API_VERSION!r}, found {value.get('apiVersion')!r}")
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise document.error(("kind",), f"expected one of {', '.join(KINDS)}, found {kind!r}")
    model = KINDS[kind]
    try:
        manifest = model.model_validate(value)
    except ValidationError as exc:
        raise _explain(document, exc) from exc
    manifest._file = document.file
    return manifest


def parse_value(value: Any, origin: str = "request") -> Manifest:
    """Validate a manifest that came as JSON (the HTTP API); errors name fields but no lines."""
    return parse(Document(Path(origin), value, {}))


def json_schemas() -> dict[str, dict[str, Any]]:
    """The JSON schema of every kind, by kind."""
    return {
        kind: {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
        for kind, model in KINDS.items()
    }


def _explain(document: Document, exc: ValidationError) -> ManifestError:
    problems = []
    for error in exc.errors():
        path: FieldPath = tuple(part for part in error["loc"] if not str(part).startswith("function-"))
        match error["type"]:
            case "extra_forbidden":
                known = _fields_at(document.value.get("kind", ""), path[:-1])
                what = "unknown field" + (f"; expected one of {', '.join(known)}" if known else "")
            case "missing":
                what = "missing"
            case _:
                found = error["input"]
                shown = f", found {found!r}" if isinstance(found, str | int | float | bool | None) else ""
                what = error["msg"].removeprefix("Value error, ") + shown
        problems.append(document.error(path, what).message)
    return ManifestError("\n".join(problems), hint="the schemas of all kinds are in docs/generated/schemas")


def _fields_at(kind: str, path: FieldPath) -> list[str]:
    """The fields known at ``path``, so that an unknown one can be answered by what was expected."""
    model: Any = KINDS.get(kind)
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model is not None else None
        model = _model_in(field.annotation) if field is not None else None
    return list(model.model_fields) if model is not None else []


def _model_in(annotation: Any) -> Any:
    """The pydantic model inside ``X``, ``X | None`` or ``list[X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := _model_in(argument):
            return found
    return None
