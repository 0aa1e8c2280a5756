"""The manifest of a model: one version of one network, with its pictures, what its answers mean, and what boards are held to."""

from __future__ import annotations

from typing import Annotated, Literal

from edgefleet_shared.reading import AnswerKind, Decoder
from pydantic import Field, model_validator

from edgefleet_controller.manifests.base import Count, ManifestBase, Name, Share, Strict, Version


class Source(Strict):
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


class PictureInput(Strict):
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


class Priors(Strict):
    """The boxes that an SSD's outputs are relative to, and how: the centre is ``prior + output * variance * prior's sides``, the sides are
    ``exp(output * variance)`` times the prior's, or ``output * variance`` times (``linear``)."""

    path: str = Field(
        description="text file, one prior a line: x and y of its centre, width, height, in shares of the input's sides"
    )
    variances: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=4, max_length=4)] = Field(
        default=[0.1, 0.1, 0.2, 0.2], description="of x, y, width, height; where these are divided by: 1 / scale"
    )
    order: Literal["xy", "yx"] = Field(default="xy", description="yx: outputs are y, x, height, width (TensorFlow's)")
    sides: Literal["exponential", "linear"] = "exponential"


class Detection(Strict):
    """How outputs become boxes, as the application does it; x before y, width before height, all in pixels of the input.

    ``yolov3``: one output per scale, batch x anchors * (5 + classes) x rows x columns, before any sigmoid, with ``anchors`` (width, height in
    pixels) and ``masks`` (their numbers) per output. ``yolov5`` (also v6, v7): one output, batch x N x (5 + classes): centre, sides, objectness,
    scores. ``yolov8`` (and later): one output, batch x (4 + classes) x N: centre, sides, scores. ``yolox``: as yolov5, in cells of grids of these
    ``strides``. ``boxes``: two outputs, boxes (batch x N x 4: left, top, right, bottom) and scores (batch x N x classes), in
    any order unless both have four columns.
    ``ssd``: the same (batch x N x 4 or more, of which the first 4 count), relative to ``priors``. ``end_to_end`` (YOLOv10 and exports that drop
    overlaps themselves): one output, batch x N x 6: left, top, right, bottom, score, class, in any order of rows; ``nms_iou`` does nothing."""

    decoder: Decoder
    anchors: list[Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)]] = []
    masks: list[list[Annotated[int, Field(ge=0)]]] = []
    strides: list[Count] = Field(default=[8, 16, 32], description="yolox only")
    scores: Literal["as_is", "sigmoid", "softmax"] = Field(
        default="as_is", description="boxes and ssd: what is still to be done to them"
    )
    background: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="boxes and ssd: number of the class that stands for no box"
    )
    priors: Priors | None = Field(default=None, description="ssd only")
    relative: bool = Field(
        default=False,
        description="yolov5, yolov8, boxes and end_to_end: in shares of the input's sides, as TFLite exports have it",
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
        if self.relative and self.decoder in ("yolov3", "yolox", "ssd"):
            raise ValueError(f"decoder {self.decoder} has no relative coordinates")
        if (self.decoder == "ssd") != (self.priors is not None):
            raise ValueError("decoder ssd and priors go together")
        if self.decoder not in ("boxes", "ssd") and (self.scores != "as_is" or self.background is not None):
            raise ValueError(f"decoder {self.decoder} has no scores and no background to tell of")
        return self


class Text(Strict):
    """How an output (batch x steps x classes) becomes a line, greedily by CTC. Class 0 is the blank; the others are the lines of
    ``characters``, then a space if ``space``."""

    characters: str = Field(description="text file, one character a line")
    space: bool = True


class Segmentation(Strict):
    """How an output becomes a class for each pixel. Scores of several classes: the largest is the answer. One channel, or none: a pixel is in the mask
    above ``threshold``, as the application has it. Whole numbers (a network that ends in ArgMax) are answers already."""

    layout: Literal["NCHW", "NHWC"] = "NCHW"
    threshold: float | None = Field(default=None, description="of a mask of one channel, in the output's own unit")


class Output(Strict):
    """``classification``: the largest of the last axis is the answer; ``detection``: boxes; ``text``: a line, spaces included;
    ``segmentation``: a class for each pixel; ``raw``: values are compared within a tolerance."""

    kind: AnswerKind = "classification"
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


class Pictures(Strict):
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


class Pruning(Strict):
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


class OutputTolerance(Strict):
    """How far the values of one output may lie from the float model's: ``tolerance_abs + tolerance_rel * |value|``."""

    tolerance_abs: Annotated[float, Field(ge=0)] = 0.0
    tolerance_rel: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _some(self) -> OutputTolerance:
        if not (self.tolerance_abs or self.tolerance_rel):
            raise ValueError("give tolerance_abs or tolerance_rel")
        return self


class ModelAcceptance(Strict):
    """What every board must show on the golden pictures: as much agreement in the answers that ``output`` tells of, which for a detector is the lower of
    recall and precision of its boxes. ``tolerance_*`` are for kind ``raw``, whose answers are values; with ``detection``, ``text`` and ``segmentation`` they
    have the board compare values in place of boxes, lines and pixels."""

    min_agreement: Share = 0.9
    min_cosine: Annotated[float, Field(ge=0, le=1)] = 0.9
    tolerance_abs: Annotated[float, Field(ge=0)] = 0.0
    tolerance_rel: Annotated[float, Field(ge=0)] = 0.0
    outputs: dict[str, OutputTolerance] = Field(
        default={}, description="by the output's name, where one tolerance does not suit all: a score beside pixels"
    )
    min_golden: Count = 8


class ModelSpec(Strict):
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
        by_value = bool(limits.tolerance_abs or limits.tolerance_rel)
        if kind == "raw" and not by_value:
            raise ValueError("output kind raw needs acceptance.tolerance_abs or acceptance.tolerance_rel")
        if limits.outputs and (kind == "classification" or not by_value):
            raise ValueError(
                "acceptance.outputs goes with output kinds that are compared by their values, and with a tolerance for the other outputs"
            )
        if by_value and self.output.detection is not None and self.output.detection.decoder == "end_to_end":
            raise ValueError(
                "decoder end_to_end has its boxes in no fixed order: leave acceptance.tolerance_* away, which compare place by place"
            )
        if self.holdout.truth is not None and kind not in ("classification", "text"):
            raise ValueError(f"holdout.truth has no form for output kind {kind}")
        training = self.prune.training if self.prune is not None else None
        if training is not None and training.truth is not None and kind != "classification":
            raise ValueError(f"prune.training.truth has no form for output kind {kind}")
        return self


class Model(ManifestBase):
    kind: Literal["Model"]
    spec: ModelSpec
