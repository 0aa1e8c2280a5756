"""Stage 2, compile: TensorRT. Makes ONNX whose types say each layer's precision, for an engine that is built on the board.

TensorRT builds strongly typed networks: from 11 there is no builder flag for fp16 or int8, and no calibrator. So float16 is written into
the network's types, and int8 as QDQ with symmetric int8 activations and biases in float. onnxruntime answers in the engine's place: the
same arithmetic as the file says, another device.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16

from . import job, ort
from .measure import Run, measure

MAX_OPSET = 20  # of ONNX that every TensorRT since 10.0 parses


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``jobs`` (each ``recipe``, ``network`` in float or QDQ, ``compiled`` and ``stand_in``, files to write)."""
    for number, one in enumerate(request["jobs"]):
        progress("writing types", number, len(request["jobs"]))
        typed(one["network"], one["compiled"], one["recipe"]["precision"])
        os.link(one["compiled"], one["stand_in"])
    progress("writing types", len(request["jobs"]), len(request["jobs"]))
    return {}


def stand_in(path: str) -> Run:
    """Answers as an engine built from the file would."""
    return ort.load(path, int8_kernels=False)


def typed(network: str, target: str, precision: str) -> None:
    """Write a network as TensorRT builds it in a precision; float32 at its inputs and outputs always.

    Raises:
        Refused: TensorRT's parser does not take it.
    """
    model = onnx.load(network)
    check(model)
    if precision != "fp16":
        shutil.copyfile(network, target)
        return
    # Values beyond float16's range are clipped to it; the measurement tells what that costs.
    onnx.save(convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=False), target)


def check(model: onnx.ModelProto) -> None:
    """Refuse what TensorRT's parser does not know."""
    opset = max(entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"})
    if opset > MAX_OPSET:
        raise job.Refused("bad_model", f"tensorrt reads ONNX up to opset {MAX_OPSET}, this network has {opset}")
    for node in model.graph.node:
        if node.op_type in LACKS or node.domain not in ("", "ai.onnx"):
            what = node.op_type if not node.domain else f"{node.domain}.{node.op_type}"
            raise job.Refused("bad_model", f"tensorrt has no operator {what} (node {node.name or node.output[0]!r})")


# Standard operators that the parser does not know. Source: OnnxParser.supports_operator of TensorRT-RTX 1.7, which a test asks again.
LACKS = frozenset({
    "AffineGrid", "Bernoulli", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "BitShift", "BitCast", "CenterCropPad", "Col2Im", "Compress",
    "ConcatFromSequence", "ConvInteger", "CumProd", "DeformConv", "Det", "DFT", "DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger",
    "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement",
    "OptionalHasElement", "QLinearConv", "QLinearMatMul", "RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty",
    "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat",
    "StringNormalizer", "StringSplit", "SwiGLU", "TfIdfVectorizer", "Unique",
})  # fmt: skip


def main() -> None:
    job.serve({"compile": compile_model, "measure": lambda r, p: measure(stand_in, r, p)})
