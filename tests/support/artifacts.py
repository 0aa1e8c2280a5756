"""Small real artifacts, built in milliseconds: a linear picture classifier for each engine, well or badly behaved on purpose.

The network is one convolution as large as the picture, so all engines must give ``weights @ flat(picture) + bias`` and a
test can compute the truth in numpy. Pictures are 8 x 8 RGB; the served input is ``x`` FP32 [-1, 8, 8, 3], the output ``y`` FP32
[-1, 5].
"""

from __future__ import annotations

import io
import platform
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from edgefleet_shared import artifact, golden
from edgefleet_shared.artifact import Descriptor, Layout, ModelConfig
from edgefleet_shared.contract import AcceptanceContract, PictureEncoding, TensorSpec
from edgefleet_shared.fingerprint import Requirement

SIDE, CHANNELS, CLASSES = 8, 3, 5
FEATURES = SIDE * SIDE * CHANNELS
HUNGRY_BYTES = 400_000_000
ENCODING = PictureEncoding(mean=(127.5,), std=(127.5,), layout="NHWC", colour="RGB")

# good      answers like its reference
# wrong     loads and runs, but its weights are not those that the reference was computed with
# crash     every inference divides an integer as no x86 CPU can: SIGFPE kills the process
# poison    good, but a picture whose first value is exactly 1.0 (a pixel of 255) kills the process
# hungry    good, but a picture whose first value is exactly 1.0 makes it take HUNGRY_BYTES, and keep them
# corrupt   the model file is no model
Behaviour = Literal["good", "wrong", "crash", "poison", "hungry", "corrupt"]
EngineName = Literal["onnxruntime", "tflite", "openvino", "ncnn", "iree", "building"]


def weights_of(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(weights CLASSES x FEATURES, bias CLASSES), float32; another seed is another model."""
    random = np.random.default_rng(seed)
    return (
        (random.normal(size=(CLASSES, FEATURES)) * 0.1).astype(np.float32),
        (random.normal(size=CLASSES) * 0.1).astype(np.float32),
    )


def truth(seed: int, x: np.ndarray) -> np.ndarray:
    """What a good model of ``seed`` answers to the encoded pictures ``x`` (N x 8 x 8 x 3)."""
    weights, bias = weights_of(seed)
    return x.reshape(len(x), -1) @ weights.T + bias


def pictures(seed: int, count: int = 16) -> np.ndarray:
    """uint8 pictures that lean clearly to one class each, so that quantization does not flip them."""
    weights, _ = weights_of(seed)
    random = np.random.default_rng(seed + 1000)
    leaning = np.sign(weights)[np.arange(count) % CLASSES].reshape(count, SIDE, SIDE, CHANNELS)
    return np.clip(random.integers(60, 190, leaning.shape) + leaning * 40, 0, 250).astype(np.uint8)


def onnx_model(seed: int, behaviour: Behaviour = "good", batch: int | str = "n", padding_bytes: int = 0) -> bytes:
    """The classifier as ONNX.

    Args:
        batch: 1 for a file with a fixed batch, "n" for any.
        padding_bytes: unused weights that make the file (and its worker) as large as one wants.
    """
    from onnx import TensorProto as T
    from onnx import helper as h
    from onnx import numpy_helper as nh

    weights, bias = weights_of(seed)
    if behaviour == "wrong":
        weights = -weights
    kernel = weights.reshape(CLASSES, SIDE, SIDE, CHANNELS).transpose(0, 3, 1, 2)
    nodes = [
        h.make_node("Transpose", ["x"], ["nchw"], perm=[0, 3, 1, 2]),
        h.make_node("Conv", ["nchw", "kernel", "bias"], ["conv"], kernel_shape=[SIDE, SIDE]),
        h.make_node("Flatten", ["conv"], ["logits"]),
    ]
    constants = [
        nh.from_array(np.ascontiguousarray(kernel), "kernel"),
        nh.from_array(bias, "bias"),
    ]
    last = "logits"
    if behaviour in ("crash", "poison"):
        nodes += [
            h.make_node("Reshape", ["x", "minus_one"], ["all"]),
            h.make_node("Gather", ["all", "zero"], ["first"]),
            h.make_node("Equal", ["first", "trigger"], ["hit"]),
        ]
        # The one integer division that a CPU can't do and onnxruntime does not guard: the smallest number by -1.
        hit, miss = ("minus_1", "plus_1") if behaviour == "poison" else ("plus_1", "minus_1")
        nodes += [
            h.make_node("Where", ["hit", hit, miss], ["divisor"]),
            h.make_node("Div", ["smallest", "divisor"], ["quotient"]),
            h.make_node("Cast", ["quotient"], ["as_float"], to=T.FLOAT),
            h.make_node("Mul", ["as_float", "nothing"], ["added"]),
            h.make_node("Add", ["logits", "added"], ["y"]),
        ]
        constants += [
            nh.from_array(np.array([-1], np.int64), "minus_one"),
            nh.from_array(np.array([0], np.int64), "zero"),
            nh.from_array(np.array([1.0 if behaviour == "poison" else 1e9], np.float32), "trigger"),
            nh.from_array(np.array([-1], np.int32), "minus_1"),
            nh.from_array(np.array([1], np.int32), "plus_1"),
            nh.from_array(np.array([np.iinfo(np.int32).min], np.int32), "smallest"),
            nh.from_array(np.array([0.0], np.float32), "nothing"),
        ]
        last = "y"
    if behaviour == "hungry":
        nodes += [
            h.make_node("Reshape", ["x", "minus_one"], ["all"]),
            h.make_node("Gather", ["all", "zero"], ["first"]),
            h.make_node("Equal", ["first", "trigger"], ["hit"]),
            h.make_node("Where", ["hit", "many", "few"], ["count"]),
            h.make_node("ConstantOfShape", ["count"], ["heap"], value=nh.from_array(np.array([1.0], np.float32))),
            h.make_node("ReduceMax", ["heap"], ["summit"], keepdims=0),
            h.make_node("Mul", ["summit", "nothing"], ["added"]),
            h.make_node("Add", ["logits", "added"], ["y"]),
        ]
        constants += [
            nh.from_array(np.array([-1], np.int64), "minus_one"),
            nh.from_array(np.array([0], np.int64), "zero"),
            nh.from_array(np.array([1.0], np.float32), "trigger"),
            nh.from_array(np.array([HUNGRY_BYTES // 4], np.int64), "many"),
            nh.from_array(np.array([1], np.int64), "few"),
            nh.from_array(np.array(0.0, np.float32), "nothing"),
        ]
        last = "y"
    if padding_bytes:
        ballast = np.random.default_rng(seed).integers(1, 255, padding_bytes // 4, dtype=np.int32).astype(np.float32)
        constants.append(nh.from_array(ballast, "ballast"))
        nodes += [
            h.make_node("ReduceMax", ["ballast"], ["top"], keepdims=0),
            h.make_node("Mul", ["top", "scalar_zero"], ["weightless"]),
            h.make_node("Add", [last, "weightless"], ["padded"]),
        ]
        constants.append(nh.from_array(np.array(0.0, np.float32), "scalar_zero"))
        last = "padded"
    if last != "y":
        nodes.append(h.make_node("Identity", [last], ["y"]))
    graph = h.make_graph(
        nodes, "classifier",
        [h.make_tensor_value_info("x", T.FLOAT, [batch, SIDE, SIDE, CHANNELS])],
        [h.make_tensor_value_info("y", T.FLOAT, [batch, CLASSES])],
        constants,
    )  # fmt: skip
    return bytes(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9).SerializeToString())


def wide_model(width: int, inputs: int = 4) -> bytes:
    """Another network as ONNX: ``width`` times the sum over each row of ``x`` FP32 [-1, inputs], as ``y`` FP32 [-1, width]."""
    from onnx import TensorProto as T
    from onnx import helper as h
    from onnx import numpy_helper as nh

    graph = h.make_graph(
        [h.make_node("MatMul", ["x", "ones"], ["y"])], "wide",
        [h.make_tensor_value_info("x", T.FLOAT, ["n", inputs])], [h.make_tensor_value_info("y", T.FLOAT, ["n", width])],
        [nh.from_array(np.ones((inputs, width), np.float32), "ones")],
    )  # fmt: skip
    return bytes(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9).SerializeToString())


def table_model(values: list[float]) -> bytes:
    """Another network as ONNX: ``y`` FP32 [-1] are the ``values`` at the places ``x`` INT64 [-1]; it fails where there is none."""
    from onnx import TensorProto as T
    from onnx import helper as h
    from onnx import numpy_helper as nh

    graph = h.make_graph(
        [h.make_node("Gather", ["values", "x"], ["y"])], "table",
        [h.make_tensor_value_info("x", T.INT64, ["n"])], [h.make_tensor_value_info("y", T.FLOAT, ["n"])],
        [nh.from_array(np.array(values, np.float32), "values")],
    )  # fmt: skip
    return bytes(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9).SerializeToString())


def detector_model(rows: np.ndarray) -> bytes:
    """A detector as ONNX that sees the same in every picture ``x`` FP32 [-1, SIDE, SIDE, CHANNELS]: ``rows`` (boxes x 6), as ``y`` FP32 [-1, boxes, 6]."""
    from onnx import TensorProto as T
    from onnx import helper as h
    from onnx import numpy_helper as nh

    graph = h.make_graph(
        [
            h.make_node("ReduceSum", ["x", "places"], ["sums"], keepdims=0),
            h.make_node("Mul", ["sums", "nothing"], ["zeros"]),
            h.make_node("Reshape", ["zeros", "each"], ["column"]),
            h.make_node("Add", ["column", "rows"], ["y"]),
        ],
        "detector",
        [h.make_tensor_value_info("x", T.FLOAT, ["n", SIDE, SIDE, CHANNELS])],
        [h.make_tensor_value_info("y", T.FLOAT, ["n", *rows.shape])],
        [
            nh.from_array(np.array([1, 2, 3]), "places"), nh.from_array(np.array(0, np.float32), "nothing"),
            nh.from_array(np.array([-1, 1, 1]), "each"), nh.from_array(rows.astype(np.float32)[None], "rows"),
        ],
    )  # fmt: skip
    return bytes(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9).SerializeToString())


def echo_model(elem_type: int, width: int) -> bytes:
    """Another network as ONNX: ``y`` is ``x``, [-1, width] of the ONNX type ``elem_type``."""
    from onnx import helper as h

    graph = h.make_graph(
        [h.make_node("Identity", ["x"], ["y"])], "echo",
        [h.make_tensor_value_info("x", elem_type, ["n", width])], [h.make_tensor_value_info("y", elem_type, ["n", width])],
    )  # fmt: skip
    return bytes(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9).SerializeToString())


def tflite_model(seed: int, behaviour: Behaviour = "good", quantized: bool = False) -> bytes:
    """The classifier as a .tflite file of batch 1: one FULLY_CONNECTED, float or int8 inside and outside."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as s

    weights, bias = weights_of(seed)
    if behaviour == "wrong":
        weights = -weights
    in_scale, out_scale = 1 / 127.0, 0.2

    def quantization(scale: float) -> Any:
        q = s.QuantizationParametersT()
        q.scale, q.zeroPoint = [scale], [0]
        return q

    def tensor(name: str, shape: list[int], kind: int, buffer: int, scale: float | None = None) -> Any:
        t = s.TensorT()
        t.name, t.shape, t.type, t.buffer = name, shape, kind, buffer
        t.quantization = None if scale is None else quantization(scale)
        return t

    w_scale = float(np.abs(weights).max() / 127)
    contents = [None, weights.tobytes(), bias.tobytes()]
    kinds: list[tuple[int, float | None]] = [(s.TensorType.FLOAT32, None)] * 4
    if quantized:
        contents[1] = np.rint(weights / w_scale).astype(np.int8).tobytes()
        contents[2] = np.rint(bias / (in_scale * w_scale)).astype(np.int32).tobytes()
        int8, int32 = s.TensorType.INT8, s.TensorType.INT32
        kinds = [(int8, in_scale), (int8, w_scale), (int32, in_scale * w_scale), (int8, out_scale)]

    def buffer(content: bytes | None) -> Any:
        b = s.BufferT()
        b.data = None if content is None else np.frombuffer(content, np.uint8)
        return b

    code = s.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = s.BuiltinOperator.FULLY_CONNECTED
    code.version = 4 if quantized else 1
    op = s.OperatorT()
    op.opcodeIndex, op.inputs, op.outputs = 0, [0, 1, 2], [3]
    op.builtinOptionsType = s.BuiltinOptions.FullyConnectedOptions
    op.builtinOptions = s.FullyConnectedOptionsT()
    graph = s.SubGraphT()
    graph.tensors = [
        tensor("serving_default_x:0", [1, SIDE, SIDE, CHANNELS], kinds[0][0], 0, kinds[0][1]),
        tensor("weights", [CLASSES, FEATURES], kinds[1][0], 1, kinds[1][1]),
        tensor("bias", [CLASSES], kinds[2][0], 2, kinds[2][1]),
        tensor("StatefulPartitionedCall:0", [1, CLASSES], kinds[3][0], 0, kinds[3][1]),
    ]
    graph.inputs, graph.outputs, graph.operators = [0], [3], [op]
    model = s.ModelT()
    model.version, model.operatorCodes, model.subgraphs = 3, [code], [graph]
    model.buffers = [buffer(c) for c in contents]
    builder = flatbuffers.Builder(4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def openvino_model(seed: int, behaviour: Behaviour = "good", batch: int | str = "n") -> bytes:
    """The classifier as edgefleet's OpenVINO blob: a stored ZIP of model.xml and model.bin."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "model.onnx")
        source.write_bytes(onnx_model(seed, behaviour, batch))
        openvino.save_model(openvino.convert_model(source), Path(folder, "model.xml"), compress_to_fp16=False)
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for name in ("model.xml", "model.bin"):
                archive.writestr(zipfile.ZipInfo(name), Path(folder, name).read_bytes())
    return stream.getvalue()


def ncnn_model(seed: int, behaviour: Behaviour = "good") -> bytes:
    """The classifier as edgefleet's ncnn blob: model.bin, then a stored ZIP of model.param, written by hand (one InnerProduct)."""
    weights, bias = weights_of(seed)
    if behaviour == "wrong":
        weights = -weights
    param = f"7767517\n2 2\nInput in0 0 1 in0\nInnerProduct fc 1 1 in0 out0 0={CLASSES} 1=1 2={weights.size}\n"
    stream = io.BytesIO()
    stream.write(bytes(4) + weights.tobytes() + bias.tobytes())  # the flag before weights says float32; a bias has none
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("model.param"), param)
    return stream.getvalue()


def model_file(engine: EngineName, seed: int, behaviour: Behaviour = "good") -> bytes:
    """The compiled model of ``engine``."""
    if behaviour == "corrupt":
        return b"this is no model, whatever the engine" * 50
    if engine == "tflite":
        return tflite_model(seed, behaviour)
    if engine == "openvino":
        return openvino_model(seed, behaviour)
    if engine == "ncnn":
        return ncnn_model(seed, behaviour)
    if engine == "iree":
        from support import iree

        return iree.module(onnx_model(seed, behaviour))
    return onnx_model(seed, behaviour)


PROVIDERS = {
    "onnxruntime": ("CPUExecutionProvider",), "tflite": ("CPU",), "openvino": ("CPU",), "ncnn": ("CPU",), "iree": ("local-sync",),
    "building": ("CPUExecutionProvider",),
}  # fmt: skip


def make_contract(engine: EngineName = "onnxruntime", **changes: Any) -> AcceptanceContract:
    """A contract that a good model passes on any machine that runs tests."""
    fields: dict[str, Any] = {
        "kind": "classification",
        "min_agreement": 0.9,
        "min_cosine": 0.9,
        "latency_p95_ms": 250.0,
        "peak_memory_bytes": 1 << 30,
        "allowed_providers": PROVIDERS[engine],
        "time_limit_s": 30.0,
    }
    return AcceptanceContract(**(fields | changes))


def make_config(
    *,
    model: str = "toy",
    version: str = "1",
    engine: EngineName = "onnxruntime",
    contract: AcceptanceContract | None = None,
    **changes: Any,
) -> ModelConfig:
    """The config of the classifier; ``changes`` override any of its fields."""
    fields: dict[str, Any] = {
        "schema": artifact.SCHEMA,
        "model": model,
        "version": version,
        "device_class": f"test-{engine}",
        "engine": engine,
        "precision": "fp32",
        "inputs": (TensorSpec("x", "FP32", (-1, SIDE, SIDE, CHANNELS)),),
        "outputs": (TensorSpec("y", "FP32", (-1, CLASSES)),),
        "requires": Requirement(arch=platform.machine(), engine=engine),
        "contract": contract or make_contract(engine),
        "encoding": ENCODING,
    }
    return ModelConfig(**(fields | changes))


def make_artifact(
    layout: Layout,
    *,
    model: str = "toy",
    version: str = "1",
    engine: EngineName = "onnxruntime",
    seed: int = 1,
    behaviour: Behaviour = "good",
    contract: AcceptanceContract | None = None,
    content: bytes | None = None,
    golden_pictures: np.ndarray | None = None,
    references: np.ndarray | None = None,
    **config: Any,
) -> Descriptor:
    """Write one artifact into ``layout``; its manifest's descriptor comes back.

    Args:
        seed: which model; ``truth(seed, x)`` is what a good one answers.
        behaviour: how the compiled model differs from a good one, if it does.
        content: the compiled model itself, in place of the classifier.
        references: what it should answer to the golden pictures, in place of the classifier's classes.
        config: overrides of :class:`ModelConfig` fields.
    """
    shown = pictures(seed) if golden_pictures is None else golden_pictures
    encoded = golden.encode_pictures(shown, ENCODING)
    references = truth(seed, encoded) if references is None else references
    config.setdefault("statistics", golden.statistics({"x": encoded}, {"y": references}, classification=True))
    labels = msgspec.json.encode([f"class {i}" for i in range(CLASSES)])
    return artifact.build(
        layout,
        make_config(model=model, version=version, engine=engine, contract=contract, **config),
        [
            (artifact.MODEL_LAYER, model_file(engine, seed, behaviour) if content is None else content),
            (artifact.LABELS_LAYER, labels),
            (artifact.GOLDEN_LAYER, golden.pack({"x": shown}, {"y": references})),
        ],
    )
