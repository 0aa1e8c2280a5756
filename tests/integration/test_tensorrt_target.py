"""The TensorRT target: what the board's TensorRT gets to build from, and what onnxruntime answers to it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.source.importing import import_model
from edgefleet_shared import artifact
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import ModelError
from onnx import TensorProto, numpy_helper
from support.networks import Net, classifier, device_class, project

TOOLCHAINS = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))


def compiled(folder: Path, model: onnx.ModelProto, **spec: Any) -> tuple[CompileResult, onnx.ModelProto]:
    layout = Layout(folder / "layout")
    version = import_model(project(folder, model), folder, layout, cache=folder)
    made = device_class("tensorrt", arch="aarch64", **{"search": {"effort": "fixed", "prefer": "size"}, **spec})
    result = compile_version(version, made, layout, Toolchains(TOOLCHAINS), cache=folder / "cache")
    layer = layout.manifest(result.artifact.digest).layer(artifact.MODEL_LAYER)
    return result, onnx.load(str(layout.path(layer.digest)))


def of_type(model: onnx.ModelProto, kind: int) -> list[onnx.TensorProto]:
    return [tensor for tensor in model.graph.initializer if tensor.data_type == kind]


def test_int8_is_qdq_without_zero_points_and_with_biases_in_float(tmp_path: Path) -> None:
    result, model = compiled(tmp_path, classifier())
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") >= 3
    assert of_type(model, TensorProto.INT8)
    assert not of_type(model, TensorProto.UINT8)
    assert not of_type(model, TensorProto.INT32), "a bias is quantized"
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) == 3:
            assert not np.any(constants[node.input[2]]), f"{node.name} has a zero point"
    assert result.figures.agreement >= 0.7
    assert result.figures.stand_in.startswith("onnxruntime")
    assert (result.figures.engine, result.figures.engine_version) == ("tensorrt", ""), "the board's, not onnxruntime's"
    assert result.figures.unmeasured == ("latency", "memory")


def test_float16_is_in_the_types_and_the_edges_stay_float32(tmp_path: Path) -> None:
    result, model = compiled(tmp_path, classifier(), precision="fp16")
    weights = [tensor for tensor in model.graph.initializer if np.prod(tensor.dims) > 16]
    assert weights
    assert {tensor.data_type for tensor in weights} == {TensorProto.FLOAT16}
    edges = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.elem_type for value in edges} == {TensorProto.FLOAT}
    assert [value.name for value in edges] == ["image", "scores"]
    assert result.figures.agreement >= 0.95
    assert result.figures.compiled_bytes < 0.75 * result.figures.float_bytes
    config = Layout(tmp_path / "layout").config(Layout(tmp_path / "layout").manifest(result.artifact.digest))
    assert (config.engine, config.precision, config.contract.allowed_providers) == ("tensorrt", "fp16", ("TensorRT",))


def test_an_operator_that_tensorrt_lacks_is_named_with_its_node(tmp_path: Path) -> None:
    net = Net()
    net.conv(3, 8)
    lost = net.add("Det")
    with pytest.raises(ModelError, match=rf"tensorrt has no operator Det \(node '{lost}'\)"):
        compiled(tmp_path, net.model([1, 8]), precision="fp16")


def test_a_search_leaves_layers_in_float_and_the_front_is_in_the_report(tmp_path: Path) -> None:
    result, _ = compiled(tmp_path, classifier(), search={"effort": "full"}, accuracy={"min_agreement": 0.9})
    assert result.candidates > 3
    assert result.figures.agreement >= 0.9
