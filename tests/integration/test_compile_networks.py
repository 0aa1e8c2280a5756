"""Networks that plain int8 gets wrong, on real toolchains."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgefleet_shared import artifact
from edgefleet_shared.errors import QualityError
from onnx import helper
from support.compiling import ENGINES, Bench, class_here
from support.networks import Net, classifier, project


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def wide(net: Net) -> list[int]:
    """Pads that TFLite can't express, pools, normalisation, squeeze and excite, concatenation."""
    net.conv(3, 8, stride=2, pads=[1, 1, 1, 1])
    net.add("Relu")
    net.add("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    trunk = net.last
    net.add("GlobalAveragePool")
    net.conv(8, 8, 1, pads=[0, 0, 0, 0])
    net.add("HardSigmoid", alpha=1 / 6, beta=0.5)
    net.add("Mul", trunk)
    left = net.last
    net.conv(8, 4, 1, pads=[0, 0, 0, 0])
    net.add("HardSwish")
    net.add("Concat", left, axis=1)
    values = [net.constant(net.rng.uniform(0.5, 1.5, 12).astype(np.float32)) for _ in range(4)]
    net.add("BatchNormalization", *values, epsilon=1e-3)
    net.add("LeakyRelu", alpha=0.1)
    net.add("AveragePool", kernel_shape=[2, 2], strides=[2, 2])
    net.add("Add", net.constant(net.rng.normal(size=(12, 1, 1)).astype(np.float32)))
    net.add("Sigmoid")
    net.add("Reshape", net.constant(np.array([0, -1], np.int64)))
    net.dense(192, 6)
    net.add("Softmax", axis=-1)
    return [1, 6]


def shapes(net: Net) -> list[int]:
    """Transposes, squeezes, reductions, padding, arithmetic over another order."""
    net.add("Pad", net.constant(np.array([0, 0, 1, 2, 0, 0, 1, 0], np.int64)))
    net.conv(3, 6, 5, pads=[0, 0, 0, 0], stride=3)
    net.add("Sub", net.constant(np.array(0.25, np.float32)))
    net.add("Transpose", perm=[0, 2, 3, 1])
    net.add("Mul", net.constant(net.rng.normal(size=6).astype(np.float32)))
    net.add("Transpose", perm=[0, 3, 1, 2])
    net.conv(6, 6, 3, group=6)
    net.add("Tanh")
    net.add("ReduceMean", axes=[2], keepdims=0)
    net.add("Unsqueeze", net.constant(np.array([2], np.int64)))
    net.add("ReduceMax", axes=[3], keepdims=1)
    net.add("Squeeze", net.constant(np.array([2, 3], np.int64)))
    net.add("Clip", net.constant(np.array(-0.5, np.float32)), net.constant(np.array(0.5, np.float32)))
    net.add("MatMul", net.constant(net.rng.normal(size=(6, 4)).astype(np.float32)))
    return [1, 4]


@pytest.mark.parametrize("build", [wide, shapes])
def test_a_float_tflite_answers_as_onnxruntime_does(bench: Bench, build: Any) -> None:
    net = Net(3)
    shape = build(net)
    raw = {"output": {"kind": "raw"}, "acceptance": {"min_agreement": 1.0, "tolerance_abs": 1e-4}}
    version = bench.version(project(bench.folder, net.model(shape, opset=14), **raw))
    target = class_here("tflite", precision="fp32", accuracy={"min_agreement": 1.0})
    assert bench.compile(version, target).figures.agreement == 1.0


def test_an_output_that_the_network_itself_reads_on_in_float_is_served_by_tflite(bench: Bench) -> None:
    net = Net()
    net.conv(3, 6, stride=4)
    net.add("Flatten")
    net.add("Identity")
    net.nodes[-1].output[:] = ["all"]
    net.add("ReduceMax", first="all", axes=[1], keepdims=1)  # ai-edge-quantizer leaves it in float
    model = net.model([1, 1])
    model.graph.output.append(helper.make_tensor_value_info("all", onnx.TensorProto.FLOAT, [1, 384]))
    manifest = project(bench.folder, model, output={"kind": "raw"}, acceptance={"tolerance_abs": 0.2})
    result = bench.compile(bench.version(manifest), class_here("tflite", search={"effort": "fixed", "prefer": "size"}))
    assert (result.precision, result.quality) == ("int8", "passed")
    assert min(result.figures.sqnr_db_by_output.values()) > 20


@pytest.mark.parametrize("mask", [-1e4, float(np.finfo(np.float32).min)])
def test_attention_behind_a_causal_mask_is_quantized_as_it_is_without_one(bench: Bench, mask: float) -> None:
    net = Net(5)
    net.conv(3, 16, 4, stride=4, pads=[0, 0, 0, 0])
    net.add("Reshape", net.constant(np.array([1, 16, 64])))
    tokens = net.add("Transpose", perm=[0, 2, 1])
    query, key, value = (
        net.add("MatMul", net.constant(net.rng.normal(size=(16, 16)).astype(np.float32)), first=tokens)
        for _ in range(3)
    )
    turned = net.add("Transpose", first=key, perm=[0, 2, 1])
    net.add("MatMul", turned, first=query)
    net.add("Add", net.constant(np.triu(np.full((64, 64), mask, np.float32), 1)))
    net.add("Softmax", axis=-1)
    net.add("MatMul", value)
    net.add("ReduceMean", axes=[1], keepdims=0)
    net.dense(16, 10)
    version = bench.version(
        project(bench.folder, net.model([1, 10]), output={"kind": "raw"}, acceptance={"tolerance_abs": 5})
    )
    for engine in ("onnxruntime", "tflite"):
        target = class_here(engine, search={"effort": "fixed", "prefer": "size"}, options={"scope": "all"})
        result = bench.compile(version, target)
        assert (result.precision, result.quality) == ("int8", "passed"), engine
        assert result.figures.sqnr_db is not None
        assert result.figures.sqnr_db > 12, engine


def test_prelus_are_shipped_to_each_engine_as_it_is_fast_at_them(bench: Bench) -> None:
    net = Net(3)
    for inputs in (3, 8):
        net.conv(inputs, 8, stride=2)
        net.add("PRelu", net.constant(net.rng.uniform(0.05, 0.4, (8, 1, 1)).astype(np.float32)))
    net.conv(8, 8, 1)
    raw = {"output": {"kind": "raw"}, "acceptance": {"tolerance_abs": 0.5}}
    version = bench.version(project(bench.folder, net.model([1, 8, 8, 8]), **raw))
    shipped = dict[tuple[str, str], bytes]()
    for engine in ENGINES:
        for precision in ("fp32", "int8"):
            target = class_here(engine, precision=precision, search={"effort": "fixed", "prefer": "size"})
            result = bench.compile(version, target)
            assert (result.precision, result.quality) == (precision, "passed"), engine
            assert (result.figures.sqnr_db or 0) > 25, engine
            layer = bench.layout.manifest(result.artifact.digest).layer(artifact.MODEL_LAYER)
            shipped[engine, precision] = bench.layout.read(layer.digest, 10**7)
    for precision in ("fp32", "int8"):
        graph = onnx.ModelProto.FromString(shipped["onnxruntime", precision]).graph
        assert "PRelu" not in [node.op_type for node in graph.node]
        with zipfile.ZipFile(io.BytesIO(shipped["openvino", precision])) as archive:
            assert b"PReLU" in archive.read("model.xml")


@pytest.mark.parametrize("opset", [7, 9])
def test_a_linear_resize_of_onnxs_early_days_keeps_its_places(bench: Bench, opset: int) -> None:
    """Until operator set 10 a pixel's place was its number by the scale; later the default is half a pixel beside that."""
    net = Net(4)
    net.conv(3, 8)
    if opset == 7:
        net.add("Upsample", mode="linear", scales=[1.0, 1.0, 2.0, 2.0])
    else:
        net.add("Upsample", net.constant(np.array([1, 1, 2, 2], np.float32)), mode="linear")
    net.conv(8, 4)
    raw = {"output": {"kind": "raw"}, "acceptance": {"min_agreement": 1.0, "tolerance_abs": 1e-4}}
    model = net.model([1, 4, 64, 64], opset=opset, ir_version=5)
    version = bench.version(project(bench.folder, model, **raw))
    for engine in ENGINES:
        result = bench.compile(version, class_here(engine, precision="fp32", accuracy={"min_agreement": 1.0}))
        assert result.figures.agreement == 1.0


def of_early_days(net: Net, shape: Any, ir_version: int) -> onnx.ModelProto:
    """As operator set 8 has it: every constant an input too, and the limits of a Clip attributes."""
    limits = {c.name: float(onnx.numpy_helper.to_array(c)) for c in net.constants if not c.dims}
    for node in net.nodes:
        if node.op_type == "Clip":
            low, high = (limits[name] for name in node.input[1:])
            del node.input[1:]
            node.attribute.extend([onnx.helper.make_attribute("min", low), onnx.helper.make_attribute("max", high)])
    net.constants = [c for c in net.constants if c.name not in limits]
    model = net.model(shape, opset=8, ir_version=ir_version)
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(i.name, i.data_type, list(i.dims)) for i in model.graph.initializer
    )
    return model


def test_a_network_of_onnxs_early_days_whose_bias_is_a_row_is_quantized(bench: Bench) -> None:
    net = Net(3)
    net.conv(3, 16, stride=4)
    net.add("Relu")
    net.add("Flatten")
    net.add("MatMul", net.constant(net.rng.normal(size=(1024, 10)).astype(np.float32)))
    net.add("Add", net.constant(net.rng.normal(size=(1, 10)).astype(np.float32)))
    version = bench.version(project(bench.folder, of_early_days(net, [1, 10], 3)))
    result = bench.compile(version, class_here(search={"effort": "full", "prefer": "size"}))
    assert result.precision == "int8"
    assert result.candidates > 3


@pytest.mark.parametrize(
    ("move", "more", "shape"),
    [("Reshape", {"shape": [2, 5]}, [2, 5]), ("Transpose", {"perm": [1, 0]}, [10, 1])],
    ids=["reshaped", "turned"],
)
def test_an_output_that_comes_out_a_second_time_in_another_shape_is_the_same_twice(
    bench: Bench, move: str, more: dict[str, list[int]], shape: list[int]
) -> None:
    net = Net(6)
    net.conv(3, 16, stride=4)
    net.add("Relu")
    net.add("Flatten")
    net.dense(1024, 10)
    model = net.model([1, 10])
    if move == "Reshape":
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(more["shape"]), "shape"))
        again = helper.make_node("Reshape", ["scores", "shape"], ["again"], name="again")
    else:
        again = helper.make_node(move, ["scores"], ["again"], name="again", **more)
    model.graph.node.append(again)
    model.graph.output.append(helper.make_tensor_value_info("again", onnx.TensorProto.FLOAT, shape))
    raw = {"output": {"kind": "raw"}, "acceptance": {"min_agreement": 0.9, "tolerance_abs": 2.0}}
    small = class_here("tflite", search={"effort": "fixed", "prefer": "size"})
    result = bench.compile(bench.version(project(bench.folder, model, **raw)), small)
    assert result.precision == "int8"
    noise = result.figures.sqnr_db_by_output
    assert noise["again"] == pytest.approx(noise["scores"])


def test_what_comes_behind_an_operator_that_is_not_onnxs_own_is_quantized_too(bench: Bench) -> None:
    """Exporters and onnxruntime's own optimizer write such; ONNX tells nothing of what they make."""
    net = Net(3)
    net.conv(3, 32, stride=2)
    net.add("QuickGelu", domain="com.microsoft", alpha=1.702)
    net.conv(32, 64, stride=2)
    net.add("Relu")
    net.add("Flatten")
    net.dense(4096, 10)
    model = net.model([1, 10], extra=[helper.make_opsetid("com.microsoft", 1)])
    version = bench.version(project(bench.folder, model))
    figures = bench.compile(version, class_here(search={"effort": "fixed", "prefer": "size"})).figures
    assert figures.compiled_bytes < 0.3 * figures.float_bytes, "of what is in int8 most lies behind it"


def test_a_network_of_onnxs_early_days_whose_activations_have_limits_is_quantized(bench: Bench) -> None:
    net = Net(3)
    for inputs in (3, 32):
        net.conv(inputs, 32, stride=2)
        net.relu6()
    net.add("Flatten")
    net.dense(2048, 10)
    version = bench.version(project(bench.folder, of_early_days(net, [1, 10], 3)))
    result = bench.compile(version, class_here(search={"effort": "fixed", "prefer": "size"}))
    assert result.precision == "int8"


def test_a_normalisation_whose_constants_are_inputs_is_part_of_the_convolution_before_it(bench: Bench) -> None:
    net = Net(3)
    net.conv(3, 16, stride=2)
    rows = [net.constant(net.rng.uniform(0.5, 1.5, 16).astype(np.float32)) for _ in range(4)]
    net.add("BatchNormalization", *rows)
    net.add("Relu")
    net.add("Flatten")
    net.dense(4096, 10)
    version = bench.version(project(bench.folder, of_early_days(net, [1, 10], 4)))
    result = bench.compile(version, class_here(precision="fp32"))
    shipped = onnx.load(
        bench.layout.path(bench.layout.manifest(result.artifact.digest).layer(artifact.MODEL_LAYER).digest)
    )
    assert "BatchNormalization" not in [node.op_type for node in shipped.graph.node]


def unlike_channels(octaves: float) -> onnx.ModelProto:
    """A classifier two of whose middle value's channels are 2 ** octaves times as wide as they were, taken back by the weights that read
    them: it answers as without, and int8 leaves nothing of the other channels."""
    net = Net(5)
    net.conv(3, 32, stride=2)
    net.add("Relu")
    net.conv(32, 32)
    net.add("Relu")
    net.conv(32, 32, 1, pads=[0, 0, 0, 0])
    net.add("Relu")
    net.conv(32, 64)
    net.conv(64, 32)
    net.add("AveragePool", kernel_shape=[4, 4], strides=[4, 4])
    net.add("Flatten")
    net.dense(512, 10)
    model = net.model([1, 10])
    constants = {i.name: i for i in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    maker, reader = convolutions[1], convolutions[2]
    factors = np.where(np.arange(32) < 2, 2.0**octaves, 1.0).astype(np.float32)
    for name, by in (
        (maker.input[1], factors[:, None, None, None]), (maker.input[2], factors), (reader.input[1], 1 / factors[None, :, None, None]),
    ):  # fmt: skip
        values = onnx.numpy_helper.to_array(constants[name]) * by
        constants[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
    return model


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_network_that_int8_breaks_is_noticed_and_mixed_precision_wins_it_back(bench: Bench, engine: str) -> None:
    version = bench.version(project(bench.folder, unlike_channels(10), counts=(16, 64, 8)))
    wanted = {"accuracy": {"min_agreement": 0.95}, "budgets": {"latency_p95_ms": 100.0, "memory_bytes": 1 << 30}}
    plain = class_here(engine, search={"effort": "fixed", "prefer": "size"}, **wanted)
    with pytest.raises(QualityError, match="agreement with the float model"):
        bench.compile(version, plain)
    broken = bench.compile(version, plain, ship_despite_quality=True).figures
    mended = bench.compile(version, class_here(engine, search={"effort": "quick", "prefer": "size"}, **wanted))
    assert mended.precision == "int8"
    assert "nodes in float" in mended.recipe
    assert 1 - mended.figures.agreement <= (1 - broken.agreement) / 2
    assert mended.figures.compiled_bytes <= 1.3 * broken.compiled_bytes
    told = json.loads(bench.layout.read(mended.report, 10**7))
    assert told["layers"][0]["noise"] > 10 * told["layers"][-1]["noise"]
    assert len(told["candidates"]) > 2


def test_what_is_no_faster_in_int8_is_shipped_in_float_and_the_result_says_why(bench: Bench) -> None:
    version = bench.version(project(bench.folder, classifier()))
    result = bench.compile(
        version, class_here("tflite", search={"effort": "quick", "prefer": "accuracy"}, accuracy={"min_agreement": 1.0})
    )
    assert (result.precision, result.figures.agreement) == ("fp32", 1.0)
    assert "no int8 candidate is better here" in result.why
    config = bench.layout.config(bench.layout.manifest(result.artifact.digest))
    assert config.precision == "fp32"


def test_a_network_with_masks_of_minus_infinity_is_calibrated_all_the_same(bench: Bench) -> None:
    net = Net()
    net.conv(3, 16, stride=4)
    net.add("Relu")
    net.add("Mul", net.constant(np.array(8, np.float32)))
    mask = np.zeros((1, 16, 8, 8), np.float32)
    mask[..., -1] = -np.inf
    net.add("Add", net.constant(mask))
    net.add("Softmax", axis=-1)
    net.conv(16, 16, stride=2)
    net.add("AveragePool", kernel_shape=[2, 2], strides=[2, 2])
    net.add("Flatten")
    net.dense(64, 10)
    version = bench.version(project(bench.folder, net.model([1, 10])))
    target = class_here("openvino", search={"effort": "full", "prefer": "accuracy"}, accuracy={"min_agreement": 1.0})
    result = bench.compile(version, target)
    told = json.loads(bench.layout.read(result.report, 10**7))
    assert result.figures.agreement == 1.0
    assert {"int8", "fp16", "fp32"} == {c["recipe"]["precision"] for c in told["candidates"]}


@pytest.mark.parametrize("engine", ["onnxruntime", "tflite", "openvino"])
def test_where_all_that_computes_stays_in_float_nothing_is_rounded_and_no_bias_corrected(
    bench: Bench, engine: str
) -> None:
    """Also not what pools, pads and reshapes between."""
    net = Net(6)
    net.conv(3, 8, stride=2)
    trunk = net.add("Relu")
    net.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    shortcut = net.add("Pad", net.constant(np.array([0, 0, 0, 0, 0, 8, 0, 0], np.int64)))
    net.last = trunk
    net.conv(8, 16, stride=2)
    net.add("Add", shortcut)
    net.add("Relu")
    net.conv(16, 4)
    net.add("Reshape", net.constant(np.array([1, 256], np.int64)))
    version = bench.version(project(bench.folder, net.model([1, 256])))
    wanted = {"float_first": 9, "scope": "weighted"}
    search = {"effort": "fixed", "prefer": "size"}
    figures = bench.compile(version, class_here(engine, search=search, options=wanted)).figures
    assert figures.sqnr_db is not None
    assert figures.sqnr_db > 50


@pytest.mark.parametrize("engine", ["onnxruntime", "tflite", "openvino"])
def test_half_precision_takes_two_bytes_a_weight_and_answers_as_float_does(bench: Bench, engine: str) -> None:
    net = Net()
    net.conv(3, 64, stride=2)
    net.add("Relu")
    net.conv(64, 64, group=64)
    net.add("Relu")
    net.conv(64, 64, stride=4)
    net.add("Flatten")
    net.dense(1024, 10)
    version = bench.version(project(bench.folder, net.model([1, 10])))
    figures = bench.compile(version, class_here(engine, precision="fp16", search={"prefer": "size"})).figures
    weights = 64 * 3 * 9 + 64 * 9 + 64 * 64 * 9 + 10240
    assert figures.compiled_bytes < 2 * weights + 0.2 * figures.float_bytes
    assert figures.agreement == 1.0
    assert figures.sqnr_db is not None
    assert 50 < figures.sqnr_db < 110  # rounded to 11 bits, and not left in float32


@pytest.mark.parametrize("engine", ["onnxruntime", "tflite", "openvino"])
def test_weights_that_stay_in_float_beside_int8_take_two_bytes_each(bench: Bench, engine: str) -> None:
    net = Net()
    net.conv(3, 128, 7, stride=4, pads=[3, 3, 3, 3])
    net.add("Relu")
    net.conv(128, 8, stride=2)
    net.add("Flatten")
    net.dense(128, 10)
    version, in_float = bench.version(project(bench.folder, net.model([1, 10]))), 128 * 3 * 7 * 7
    sizes = []
    for leading in (0, 1):
        search = {"effort": "fixed", "prefer": "size"}
        target = class_here(engine, search=search, options={"float_first": leading}, accuracy={"min_agreement": 0.3})
        figures = bench.compile(version, target).figures
        sizes.append(figures.compiled_bytes)
    assert sizes[1] - sizes[0] < 1.2 * in_float  # a byte more for each; in full it would be three
    assert figures.sqnr_db is not None
    assert figures.sqnr_db > 15


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("added", "beta"), [((16, 10), 1.0), ((16, 1), 2.0)])
def test_a_product_to_which_a_matrix_is_added_is_quantized(
    bench: Bench, engine: str, added: tuple[int, int], beta: float
) -> None:
    """As onnxruntime puts together what places of a picture's parts are added to."""
    net = Net(6)
    net.conv(3, 16, stride=4)
    net.add("Relu")
    net.add("AveragePool", kernel_shape=[2, 2], strides=[2, 2])
    net.add("Reshape", net.constant(np.array([16, 16], np.int64)))
    weight = net.constant(net.rng.normal(size=(16, 10)).astype(np.float32))
    net.add("Gemm", weight, net.constant(net.rng.normal(size=added).astype(np.float32)), beta=beta)
    raw = {"output": {"kind": "raw"}, "acceptance": {"tolerance_abs": 1.0}}
    version = bench.version(project(bench.folder, net.model([16, 10]), **raw))
    result = bench.compile(version, class_here(engine, search={"effort": "fixed", "prefer": "size"}))
    assert result.precision == "int8"
    assert result.figures.sqnr_db > 25


@pytest.mark.parametrize("engine", ENGINES)
def test_an_output_that_is_computed_in_float_and_read_inside_is_served(bench: Bench, engine: str) -> None:
    net = Net(7)
    net.conv(3, 16, stride=4)
    net.add("Relu")
    net.add("AveragePool", kernel_shape=[4, 4], strides=[4, 4])
    features = net.add("Flatten")
    net.add("Abs")
    net.add("ReduceMean", axes=[1], keepdims=1)
    scaled = net.add("Div", net.last, first=features)
    net.dense(64, 10)
    model = net.model([1, 10])
    model.graph.output.append(onnx.helper.make_tensor_value_info(scaled, onnx.TensorProto.FLOAT, [1, 64]))
    raw = {"output": {"kind": "raw"}, "acceptance": {"tolerance_abs": 1.0}}
    version = bench.version(project(bench.folder, model, **raw))
    result = bench.compile(version, class_here(engine, search={"effort": "fixed", "prefer": "size"}))
    assert result.precision == "int8"
    assert result.figures.sqnr_db > 20


def test_a_weight_that_only_the_body_of_a_loop_reads_is_there_in_int8_too(bench: Bench) -> None:
    net = Net(9)
    picture = net.conv(3, 8, stride=2)
    weight = net.constant((net.rng.normal(size=(8, 8, 3, 3)) * 0.1).astype(np.float32))
    count, go_on = net.constant(np.int64(3)), net.constant(np.bool_(True))
    value = onnx.helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Conv", ["before", weight], ["after"], kernel_shape=[3, 3], pads=[1] * 4),
            helper.make_node("Identity", ["go_on"], ["again"]),
        ],
        "body",
        [
            value("round", onnx.TensorProto.INT64, []),
            value("go_on", onnx.TensorProto.BOOL, []),
            value("before", onnx.TensorProto.FLOAT, [1, 8, 16, 16]),
        ],
        [value("again", onnx.TensorProto.BOOL, []), value("after", onnx.TensorProto.FLOAT, [1, 8, 16, 16])],
    )
    net.add("Loop", go_on, picture, first=count, body=body)
    net.conv(8, 64, stride=2)
    raw = {"output": {"kind": "raw"}, "acceptance": {"tolerance_abs": 1.0}}
    version = bench.version(project(bench.folder, net.model([1, 64, 8, 8]), **raw))
    result = bench.compile(version, class_here(search={"effort": "fixed", "prefer": "size"}))
    assert result.precision == "int8"
    assert result.figures.sqnr_db > 25


def test_an_auto_encoder_whose_decoder_has_the_encoders_weights_is_quantized_for_tflite_too(bench: Bench) -> None:
    net = Net(8)
    weight = net.constant((net.rng.normal(size=(16, 3, 4, 4)) * 0.2).astype(np.float32))
    net.add("Conv", weight, net.constant(net.rng.normal(size=16).astype(np.float32)), strides=[2, 2], pads=[1] * 4)
    net.add("Relu")
    bias = net.constant(net.rng.normal(size=3).astype(np.float32))
    net.add("ConvTranspose", weight, bias, strides=[2, 2], pads=[1] * 4)
    raw = {"output": {"kind": "raw"}, "acceptance": {"tolerance_abs": 1.0}}
    version = bench.version(project(bench.folder, net.model([1, 3, 32, 32]), **raw))
    result = bench.compile(version, class_here("tflite", search={"effort": "fixed", "prefer": "size"}))
    assert result.precision == "int8"
    assert result.figures.sqnr_db > 25


@pytest.mark.parametrize("op", ["InstanceNormalization", "LayerNormalization"])
def test_a_normalisation_that_tflite_computes_in_pieces_keeps_its_variances(bench: Bench, op: str) -> None:
    """Of channels, or pixels, whose spreads lie ten times apart 8 bits hold the values, not their squares."""
    net = Net()
    net.conv(3, 16, stride=2)
    net.add("Mul", net.constant(np.geomspace(0.2, 2, 16).astype(np.float32)[:, None, None]))
    layer = op == "LayerNormalization"
    if layer:
        net.add("Reshape", net.constant(np.array([1, 16, 256], np.int64)))
    size = 256 if layer else 16
    net.add(op, net.constant(np.ones(size, np.float32)), net.constant(np.zeros(size, np.float32)))
    net.add("Relu")
    net.add("Reshape", net.constant(np.array([1, 4096], np.int64)))
    net.dense(4096, 6)
    manifest = project(bench.folder, net.model([1, 6], opset=17))
    target = class_here("tflite", search={"effort": "fixed", "prefer": "size"}, accuracy={"min_agreement": 0.1})
    assert (bench.compile(bench.version(manifest), target, ship_despite_quality=True).figures.sqnr_db or 0) > 18
