"""Stage 2, compile: how old a network is. Receives one of any age, hands on one whose constants are no inputs and whose operator set is at least that which
int8 per channel needs, with the same answers."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx.version_converter
from onnx import helper

from . import job

MIN_IR_VERSION = 4  # of ONNX, from which constants need not be inputs too
PER_CHANNEL_OPSET = 13
RESIZES_SAY_WHERE = 11  # from which a Resize says how places in its output are places in its input


def of_today(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network as one of today says the same.

    Raises:
        Refused: no way from there to here.
    """
    _constants_apart(model)
    before = max(entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"})
    if before >= PER_CHANNEL_OPSET:
        return model
    try:
        after: onnx.ModelProto = onnx.version_converter.convert_version(model, PER_CHANNEL_OPSET)
    except (onnx.version_converter.ConvertError, RuntimeError, ValueError) as exc:
        raise job.Refused(
            "bad_model",
            f"the network's operator set {before} can't be raised to {PER_CHANNEL_OPSET}: {str(exc).strip().splitlines()[0]}",
            f"export it with operator set {PER_CHANNEL_OPSET} or later",
        ) from exc
    if before < RESIZES_SAY_WHERE:
        _as_before(after.graph)
    return after


def _constants_apart(model: onnx.ModelProto) -> None:
    """Leave no constant an input, as each was in ONNX's early days and some exporters still have it. onnxruntime takes such a constant for what a caller may
    replace and folds nothing into it, a normalisation into a convolution's weights neither."""
    model.ir_version = max(model.ir_version, MIN_IR_VERSION)
    constants = {tensor.name for tensor in model.graph.initializer}
    given = [value for value in model.graph.input if value.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(given)


def _as_before(graph: onnx.GraphProto) -> None:
    """Resizes by the only rule that there was; the converter leaves them the later default, half a pixel beside it (onnx 1.23)."""
    for node in _nodes(graph):
        if node.op_type == "Resize" and not any(a.name == "coordinate_transformation_mode" for a in node.attribute):
            node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
            node.attribute.append(helper.make_attribute("nearest_mode", "floor"))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inside in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _nodes(inside)
