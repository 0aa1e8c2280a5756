"""Networks whose inputs, outputs or insides are not float32, on real toolchains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgefleet_controller.manifests import Model
from edgefleet_shared.errors import ModelError, QualityError
from onnx import TensorProto, helper
from safetensors.numpy import save_file
from support.compiling import ENGINES, Bench, class_here
from support.networks import SIDE, Net, project

FLOAT, HALF, BYTES, WHOLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.INT64


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def with_samples(bench: Bench, model: onnx.ModelProto, samples: Any, **spec: Any) -> Model:
    """A project whose samples are what ``samples(count, seed)`` gives, by input name."""
    manifest = project(bench.folder, model)
    for seed, (split, count) in enumerate({"calibration": 16, "holdout": 32, "golden": 8}.items()):
        save_file(samples(count, seed), bench.folder / f"{split}.safetensors")
    paths = {split: {"path": f"{split}.safetensors"} for split in ("calibration", "holdout", "golden")}
    return Model.model_validate(
        manifest.model_dump() | {"spec": manifest.spec.model_dump() | paths | {"inputs": []} | spec}
    )


def typed(net: Net, shape: Any, *, inputs: Any = FLOAT, outputs: Any = FLOAT) -> onnx.ModelProto:
    model = net.model(shape)
    model.graph.input[0].type.tensor_type.elem_type = inputs
    model.graph.output[0].type.tensor_type.elem_type = outputs
    return model


RAW: dict[str, Any] = {"output": {"kind": "raw"}, "acceptance": {"min_agreement": 0.9, "tolerance_abs": 0.5}}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_that_takes_bytes_is_calibrated_and_judged_by_bytes(bench: Bench, engine: str) -> None:
    net = Net(6)
    net.add("Cast", to=FLOAT)
    net.add("Div", net.constant(np.float32(64.0)))
    net.conv(3, 16, stride=2)
    net.add("Relu")
    net.add("GlobalAveragePool")
    net.add("Flatten")
    net.dense(16, 5)

    def samples(count: int, seed: int) -> dict[str, Any]:
        return {"image": np.random.default_rng(seed).integers(0, 256, (count, 3, SIDE, SIDE)).astype(np.uint8)}

    version = bench.version(with_samples(bench, typed(net, [1, 5], inputs=BYTES), samples, **RAW))
    assert version.inputs[0].datatype == "UINT8"
    result = bench.compile(version, class_here(engine, search={"effort": "fixed", "prefer": "size"}))
    assert result.precision == "int8"
    assert result.figures.agreement == 1.0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_that_ends_in_classes_is_judged_by_those(bench: Bench, engine: str) -> None:
    net = Net(7)
    net.conv(3, 16)
    net.add("Relu")
    net.conv(16, 4, 1, pads=[0, 0, 0, 0])
    net.add("ArgMax", axis=1, keepdims=0)
    model = typed(net, [1, SIDE, SIDE], outputs=WHOLE)
    told = {"output": {"kind": "segmentation"}, "acceptance": {"min_agreement": 0.9, "tolerance_abs": 0.5}}
    version = bench.version(project(bench.folder, model, **told))
    figures = bench.compile(version, class_here(engine, precision="fp32")).figures
    assert figures.agreement == 1.0
    assert figures.sqnr_db > 20  # the classes themselves, and no zeros in their place


def test_openvino_finds_an_output_behind_a_cast_that_it_folds(bench: Bench) -> None:
    net = Net(8)
    net.add("Cast", to=HALF)
    net.add("Conv", net.constant(net.rng.normal(size=(8, 3, 3, 3)).astype(np.float16)), kernel_shape=[3, 3])
    net.add("Relu")
    net.add("GlobalAveragePool")
    net.add("Cast", to=FLOAT)
    version = bench.version(project(bench.folder, net.model([1, 8, 1, 1]), **RAW))
    assert bench.compile(version, class_here("openvino", precision="fp32")).figures.agreement == 1.0


def quantized() -> Net:
    """As onnxruntime's quantizer leaves a network; the names of ours are made likewise."""
    net = Net(9)

    def rounded(name: str, array: Any = None) -> None:
        scale, zero = net.constant(np.float32(0.02)), net.constant(np.int8(0) if array is not None else np.uint8(128))
        if array is None:
            net.add("QuantizeLinear", scale, zero)
            net.nodes[-1].name = f"{name}_QuantizeLinear"
            net.add("DequantizeLinear", scale, zero)
        else:
            net.add("DequantizeLinear", scale, zero, first=net.constant(array))
        net.nodes[-1].name = net.last = f"{name}_DequantizeLinear"
        net.nodes[-1].output[:] = [net.last]

    for number, inputs in enumerate((3, 8)):
        rounded(f"n{len(net.nodes) - 1}" if number else "image")
        read = net.last
        rounded(f"w{number}", net.rng.integers(-40, 40, (8, inputs, 3, 3)).astype(np.int8))
        net.add("Conv", net.last, first=read, kernel_shape=[3, 3])
        net.add("Relu")
    net.add("GlobalAveragePool")
    return net


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_that_came_quantized_is_compiled_for_every_engine(bench: Bench, engine: str) -> None:
    version = bench.version(project(bench.folder, quantized().model([1, 8, 1, 1]), **RAW))
    result = bench.compile(version, class_here(engine, search={"effort": "fixed", "prefer": "size"}))
    assert result.precision == "int8"
    assert result.figures.agreement >= 0.9
    in_float = bench.compile(version, class_here(engine, precision="fp32"))
    assert in_float.figures.agreement == 1.0


def test_what_came_quantized_is_itself_a_candidate_of_the_engine_that_reads_it(bench: Bench) -> None:
    """Who trained it with roundings has trained it for these, and no calibration finds them again."""
    model = quantized().model([1, 8, 1, 1])
    version = bench.version(project(bench.folder, model, **RAW))
    result = bench.compile(version, class_here("onnxruntime", search={"effort": "quick", "prefer": "size"}))
    tried = {c["recipe"]["quantizer"]: c for c in json.loads(bench.layout.read(result.report, 10**7))["candidates"]}
    assert tried["its own"]["figures"]["agreement"] > 0.9
    assert tried["its own"]["figures"]["p50_ms"] is not None
    elsewhere = bench.compile(version, class_here("openvino", search={"effort": "quick", "prefer": "size"}))
    tried = {c["recipe"]["quantizer"] for c in json.loads(bench.layout.read(elsewhere.report, 10**7))["candidates"]}
    assert "its own" not in tried


def test_roundings_that_can_not_be_read_as_floats_are_kept(bench: Bench) -> None:
    net = Net(9)
    scale, zero = net.constant(np.float32(0.02)), net.constant(np.uint8(128))
    net.add("QuantizeLinear", scale, zero)
    net.nodes[-1].name = "image_QuantizeLinear"
    net.add("BitwiseNot")
    net.add("DequantizeLinear", scale, zero)
    net.conv(3, 8)
    net.add("GlobalAveragePool")
    version = bench.version(project(bench.folder, net.model([1, 8, 1, 1], opset=18), **RAW))
    result = bench.compile(version, class_here(search={"effort": "fixed", "prefer": "size"}))
    assert result.figures.agreement == 1.0
    with pytest.raises(ModelError, match=r"tflite has no operator QuantizeLinear \(node 'image_QuantizeLinear'\)"):
        bench.compile(version, class_here("tflite"))


def test_an_output_of_another_size_for_each_sample_is_told(bench: Bench) -> None:
    net = Net(10)
    net.add("ReduceMax", axes=[1], keepdims=0)
    net.add("Greater", net.constant(np.float32(1.0)))
    net.add("NonZero")
    model = typed(net, [3, "found"], outputs=WHOLE)
    with pytest.raises(ModelError, match="output 'scores' has another size for each sample, such as"):
        bench.compile(bench.version(project(bench.folder, model, **RAW)), class_here())


def test_samples_that_a_network_can_not_answer_are_told_with_the_node(bench: Bench) -> None:
    net = Net(11)
    net.add("ReduceMean", axes=[2, 3], keepdims=0)
    net.add("Cast", to=WHOLE)
    net.add("Gather", net.last, first=net.constant(np.ones((4, 2), np.float32)))
    net.nodes[-1].name = "table"
    version = bench.version(project(bench.folder, net.model([1, 3, 2]), inputs=[{"name": "image"}], **RAW))
    with pytest.raises(
        ModelError, match=r"onnxruntime can't run this network: .*'table'.*indices element out of data bounds"
    ):
        bench.compile(version, class_here())


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_came_in_half_precision_are_quantized(bench: Bench, engine: str) -> None:
    net = Net(5)
    net.conv(3, 64, stride=4)
    net.add("Relu")
    net.conv(64, 128)
    net.add("Relu")
    net.conv(128, 128)
    net.add("AveragePool", kernel_shape=[4, 4], strides=[4, 4])
    net.add("Flatten")
    net.dense(512, 10)
    model = net.model([1, 10])
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    first, last = model.graph.node[0], model.graph.node[-1]
    into = onnx.helper.make_node("Cast", ["image"], ["half"], name="into", to=HALF)
    out = onnx.helper.make_node("Cast", [last.input[0]], last.output, name="out", to=FLOAT)
    first.input[0] = "half"
    model.graph.node.remove(last)
    model.graph.node.insert(0, into)
    model.graph.node.append(out)
    target = class_here(engine, search={"effort": "fixed", "prefer": "size"})
    result = bench.compile(bench.version(project(bench.folder, model)), target)
    assert result.precision == "int8"
    weights = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    assert result.figures.compiled_bytes < 0.75 * 2 * weights
    assert result.figures.sqnr_db > 20


@pytest.mark.parametrize("engine", ENGINES)
def test_what_only_moves_values_in_half_precision_moves_them_in_float(bench: Bench, engine: str) -> None:
    """onnxruntime computes a network of halves in float here, but for a shuffle of channels, which int8 then stopped at, and TFLite refused."""
    net = Net(5)
    net.add("Cast", to=HALF)
    net.conv(3, 32, stride=4)
    left = net.add("Relu")
    ends = [net.constant(np.array(value, np.int64)) for value in ([0], [16], [32], [1])]
    first = net.add("Slice", ends[0], ends[1], ends[3], first=left)
    net.add("Slice", ends[1], ends[2], ends[3], first=left)
    net.add("Concat", first, axis=1)
    net.add("Reshape", net.constant(np.array([1, 2, 16, 8, 8], np.int64)))
    net.add("Transpose", perm=[0, 2, 1, 3, 4])
    net.add("Reshape", net.constant(np.array([1, 32, 8, 8], np.int64)))
    net.conv(32, 64, stride=2)
    net.add("AveragePool", kernel_shape=[4, 4], strides=[4, 4])
    net.add("Flatten")
    net.dense(64, 10)
    net.add("Cast", to=FLOAT)
    for tensor in net.constants:
        if tensor.data_type == FLOAT:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    target = class_here(engine, search={"effort": "fixed", "prefer": "size"})
    result = bench.compile(bench.version(project(bench.folder, net.model([1, 10]))), target)
    assert result.precision == "int8"
    assert result.figures.sqnr_db > 20


def test_what_the_engine_raises_over_a_sample_is_told_as_the_candidates_fault(bench: Bench) -> None:
    """ONNX counts an index below zero from the end; TFLite's kernel takes none."""
    table = helper.make_tensor("table", FLOAT, [16, 4], np.random.default_rng(0).normal(size=64).astype(np.float32))
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["rows"]), helper.make_node("Relu", ["rows"], ["scores"])], "net",
        [helper.make_tensor_value_info("ids", WHOLE, [1, 6])], [helper.make_tensor_value_info("scores", FLOAT, [1, 6, 4])], [table],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)

    def samples(count: int, seed: int) -> dict[str, Any]:
        return {"ids": np.random.default_rng(seed).integers(-16, 16, (count, 6))}

    version = bench.version(with_samples(bench, model, samples, **RAW))
    with pytest.raises(QualityError, match=r"engine failed: .*index out of bounds"):
        bench.compile(version, class_here("tflite"))
