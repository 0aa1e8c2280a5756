"""Stage 2, compile: operator sets. Receives a network of any, hands on one of at least that which int8 per channel needs, with the same answers."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx.version_converter
from onnx import helper

from . import job

PER_CHANNEL_OPSET = 13
RESIZES_SAY_WHERE = 11  # from which a Resize says how places in its output are places in its input


def at_least_per_channel(path: str, beside: str) -> str:
    """The network's file, or where its operator set is too old, one written ``beside``.

    Raises:
        Refused: no way from there to here.
    """
    model = onnx.load(path)
    before = max(entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"})
    if before >= PER_CHANNEL_OPSET:
        return path
    try:
        after = onnx.version_converter.convert_version(model, PER_CHANNEL_OPSET)
    except (onnx.version_converter.ConvertError, RuntimeError, ValueError) as exc:
        raise job.Refused(
            "bad_model",
            f"the network's operator set {before} can't be raised to {PER_CHANNEL_OPSET}: {str(exc).strip().splitlines()[0]}",
            f"export it with operator set {PER_CHANNEL_OPSET} or later",
        ) from exc
    if before < RESIZES_SAY_WHERE:
        _as_before(after.graph)
    raised = beside + ".opset.onnx"
    onnx.save(after, raised)
    return raised


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
