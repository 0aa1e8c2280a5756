"""Stage 1, source: networks in TensorFlow's formats. Receives .keras, .h5, a SavedModel or a .tflite, hands on ONNX (tf2onnx) with fixed shapes.

A model file of Keras can name code to run (Lambda layers, functions by module and name, SavedModels inside), and a SavedModel can hold operators that
read and write files. What a file is made of is read before anything is loaded, and only what is Keras' own is let through; :mod:`.hostile_keras`
says what. What comes out is held against the network that went in, on one random input.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx.reference

from . import hostile_keras, job, tensorflow_operators
from .canonical import canonical, copied

# KERAS_HOME: what somebody set up in their own ~/.keras decides nothing here.
os.environ |= {
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "CUDA_VISIBLE_DEVICES": "",
    "KERAS_BACKEND": "tensorflow",
    "KERAS_HOME": os.getcwd(),
}

OPSET = 15
# Operators of TFLite through which one call leaves something for the next.
STATE = ("VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE")
CLOSE = 1e-3  # of the largest output: what other orders of the same sums may differ by


def convert(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``path``, ``format`` (of :mod:`edgefleet_controller.source.formats`), ``onnx`` (file to write). Result: ``quantized``, whether it came with int8 weights
    and activations, which the ONNX has as floats."""
    progress("loading TensorFlow", 0, 2)
    if request["format"] == "tflite":
        return _from_tflite(request, progress)
    function, specs, outputs = load(request["path"], request["format"])
    import tf2onnx

    tensorflow_operators.teach()
    progress("converting to ONNX", 1, 2)
    model = _told(
        lambda: _kept(tf2onnx.convert.from_function(function, input_signature=specs, opset=OPSET)[0], function, specs)
    )
    canonical(model, [spec.name for spec in specs], outputs)
    fed = drawn(specs)
    answered = function(*fed)
    _check(model, dict(zip([spec.name for spec in specs], fed, strict=True)), [a.numpy() for a in listed(answered)])
    onnx.save(model, request["onnx"])
    return {"quantized": False}


def drawn(specs: list[Any]) -> list[Any]:
    """One random input: grey levels where bytes are asked for, 0 or 1 where other whole numbers are, which may be places in a table of two."""
    chance = np.random.default_rng(0)
    found = []
    for spec in specs:
        shape, kind = spec.shape.as_list(), np.dtype(spec.dtype.as_numpy_dtype)
        most = 256 if kind == np.uint8 else 2
        found.append((chance.random(shape) if kind.kind == "f" else chance.integers(0, most, shape)).astype(kind))
    return found


def load(path: str, kind: str) -> tuple[Any, list[Any], list[str]]:
    """(function, its inputs' specs, its outputs' names) of a Keras model or a SavedModel, looked at before it is loaded.

    Raises:
        Refused: it would run code, can't be loaded, or leaves a size open.
    """
    return _saved_model(path) if kind == "saved-model" else _keras(path, kind)


def load_keras(path: str, kind: str) -> Any:
    """A Keras model itself, looked at before it is loaded; raises as :func:`load`."""
    hostile_keras.check(path, kind)
    import keras

    try:
        return _in_float(keras.models.load_model(path, compile=False, safe_mode=True))
    except Exception as exc:  # whatever Keras raises about a file
        raise job.Refused(
            "bad_model", f"Keras {keras.__version__} can't load this model: {str(exc).splitlines()[0]}"
        ) from exc


def _in_float(model: Any) -> Any:
    """A network that was trained in mixed precision, computing in float32, in which it keeps its weights: half precision was for the machine that trained it, and
    what it is to be computed in elsewhere is the device class's to say."""
    for layer in model._flatten_layers():
        if layer.compute_dtype in ("float16", "bfloat16") and layer.variable_dtype == "float32":
            layer.dtype_policy = "float32"
    return model


def _keras(path: str, kind: str) -> tuple[Any, list[Any], list[str]]:
    model = load_keras(path, kind)
    import tensorflow as tf

    specs = []
    for number, tensor in enumerate(model.inputs):
        shape = [1, *tensor.shape[1:]]
        if None in shape:
            raise job.Refused(
                "bad_model", f"input {tensor.name!r} has the shape {tuple(tensor.shape)}; all but its first dimension must be fixed",
                "give keras.Input its whole shape, and save the model again",
            )  # fmt: skip
        specs.append(tf.TensorSpec(shape, tensor.dtype, name=_plain(tensor.name) or f"input_{number}"))

    # A network may be fed by names, and answer by them: TensorFlow counts both in the order of those, and so do model.inputs and output_names.
    form = getattr(model, "_inputs_struct", model.inputs if len(model.inputs) > 1 else model.inputs[0])

    def call(*given: Any) -> Any:
        return tf.nest.flatten(model(tf.nest.pack_sequence_as(form, list(given)), training=False))

    names = [
        _plain(name) for name in getattr(model, "output_names", None) or [layer.name for layer in model.layers[-1:]]
    ]
    return tf.function(call, input_signature=specs), specs, names


def _saved_model(path: str) -> tuple[Any, list[Any], list[str]]:
    hostile_keras.check_saved_model(path)
    import tensorflow as tf

    try:
        loaded = tf.saved_model.load(path)
    except Exception as exc:  # whatever TensorFlow raises about a file
        raise job.Refused("bad_model", f"TensorFlow can't load this SavedModel: {str(exc).splitlines()[0]}") from exc
    signature = _signature(loaded.signatures)
    wanted = signature.structured_input_signature[1]
    specs = []
    for name, spec in sorted(wanted.items()):
        shape = [1, *spec.shape.as_list()[1:]]
        if None in shape:
            raise job.Refused(
                "bad_model", f"input {name!r} has the shape {spec.shape}; all but its first dimension must be fixed"
            )
        specs.append(tf.TensorSpec(shape, spec.dtype, name=_plain(name)))
    names, outputs = sorted(wanted), sorted(signature.structured_outputs)

    def call(*given: Any) -> Any:
        found = signature(**dict(zip(names, given, strict=True)))
        return [found[name] for name in outputs]

    function = tf.function(call, input_signature=specs)
    function.keep = loaded  # its variables live as long as it does
    return function, specs, [_plain(name) for name in outputs]


def _signature(signatures: Any) -> Any:
    """What a SavedModel is served by: ``serving_default``, or the only signature that it has."""
    if "serving_default" in signatures:
        return signatures["serving_default"]
    if len(signatures) == 1:
        return next(iter(signatures.values()))
    told = f"has the signatures {', '.join(sorted(signatures))}, and no" if signatures else "has no signature, such as"
    raise job.Refused(
        "bad_model", f"this SavedModel {told} serving_default",
        "save it by model.export(path), or with what is to be served: "
        "tf.saved_model.save(model, path, signatures={'serving_default': model.call.get_concrete_function(...)})",
    )  # fmt: skip


def _from_tflite(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    import tensorflow as tf

    # Read, not mapped: behind the end of a mapped file that was cut a process dies as it does of a disk that gives nothing back.
    with open(request["path"], "rb") as stream:
        content = stream.read()
    try:
        interpreter = tf.lite.Interpreter(model_content=content)
        _of_tflite_alone([operator["op_name"] for operator in interpreter._get_ops_details()])
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as exc:
        raise job.Refused("bad_model", f"this .tflite can't be loaded: {str(exc).splitlines()[0]}") from exc
    _of_one_signature(request["path"])
    found = sorted({operator["op_name"] for operator in interpreter._get_ops_details()} & set(STATE))
    if found:
        raise job.Refused(
            "bad_model",
            f"this .tflite keeps values from one call to the next ({', '.join(found)}), and its answers depend on what was asked before",
            "export it with that state as inputs and outputs, which the application passes on",
        )
    details = interpreter.get_tensor_details()
    quantized = any(
        detail["dtype"] in (np.int8, np.uint8) and len(detail["quantization_parameters"]["scales"])
        for detail in details
    )
    ends = [*interpreter.get_input_details(), *interpreter.get_output_details()]
    if not quantized and any(detail["dtype"] != np.float32 for detail in ends):
        raise job.Refused("bad_model", "inputs and outputs of a float .tflite must be float32")
    progress("converting to ONNX", 1, 2)
    path = request["path"]
    if any(detail["sparsity_parameters"] for detail in details):
        path = _made_dense(path, request["onnx"] + ".tflite")
    model = _told(lambda: _by_command(path, request["onnx"], quantized))
    if quantized:
        _float_ends(model)
    canonical(model, [v.name for v in model.graph.input], [v.name for v in model.graph.output])
    if not quantized:
        fed = {
            d["name"]: np.random.default_rng(0).random(d["shape"], np.float32) for d in interpreter.get_input_details()
        }
        for detail in interpreter.get_input_details():
            interpreter.set_tensor(detail["index"], fed[detail["name"]])
        interpreter.invoke()
        _check(model, fed, [interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()])
    onnx.save(model, request["onnx"])
    return {"quantized": quantized}


def _of_tflite_alone(operators: list[str]) -> None:
    """Refuse operators that are not TFLite's: what they compute stands in their maker's program, not in the file."""
    from tensorflow.lite.python import schema_py_generated as schema

    foreign = Counter(name for name in operators if not hasattr(schema.BuiltinOperator, name))
    if foreign:
        told = ", ".join(f"{name} ({count} times)" if count > 1 else name for name, count in foreign.items())
        raise job.Refused(
            "bad_model",
            f"this .tflite has custom operators, which TFLite itself does not know: {told}",
            "convert the network again with TFLite's built-in operators alone, or export it as ONNX; what picks boxes out at its end "
            "(TFLite_Detection_PostProcess), leave to the application",
        )


def _of_one_signature(path: str) -> None:
    """Refuse a file of several networks where the one that engines run, its first, is not the one that is served: converters sort them by name."""
    from tensorflow.lite.python import schema_py_generated as schema

    with open(path, "rb") as stream:
        model = schema.Model.GetRootAs(stream.read(), 0)
    signatures = [model.SignatureDefs(number) for number in range(model.SignatureDefsLength())]
    graphs = {signature.SignatureKey().decode(): signature.SubgraphIndex() for signature in signatures}
    if len(graphs) <= 1 or graphs.get("serving_default") == 0:
        return
    first = ", ".join(name for name, graph in graphs.items() if graph == 0)
    raise job.Refused(
        "bad_model", f"this .tflite has the signatures {', '.join(graphs)}; boards run the first, {first}, which may not be the one that is meant",
        "convert it again with that one alone: TFLiteConverter.from_saved_model(path, signature_keys=[...])",
    )  # fmt: skip


def _made_dense(path: str, dense: str) -> str:
    """A .tflite whose constants are stored whole, which is all that tf2onnx reads; TFLite itself says what the sparse ones hold."""
    import flatbuffers
    import tensorflow as tf
    from tensorflow.lite.python import schema_py_generated as schema

    plain = (
        tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )  # a delegate keeps what it makes to itself
    interpreter = tf.lite.Interpreter(path, experimental_preserve_all_tensors=True, experimental_op_resolver_type=plain)
    interpreter.allocate_tensors()
    interpreter.invoke()  # on whatever its inputs hold: constants do not depend on them
    with open(path, "rb") as stream:
        model = schema.ModelT.InitFromPackedBuf(stream.read(), 0)
    graph = model.subgraphs[0]  # what the interpreter has run
    kept = []
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        if max(code.builtinCode, code.deprecatedBuiltinCode) != schema.BuiltinOperator.DENSIFY:
            kept.append(operator)
            continue
        whole = schema.BufferT()
        whole.data = np.frombuffer(interpreter.get_tensor(operator.outputs[0]).tobytes(), np.uint8)
        graph.tensors[operator.outputs[0]].buffer = len(model.buffers)
        model.buffers.append(whole)
        sparse = graph.tensors[operator.inputs[0]]
        sparse.buffer, sparse.sparsity = 0, None
    graph.operators = kept
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    with open(dense, "wb") as stream:
        stream.write(builder.Output())
    return dense


def _by_command(path: str, onnx_file: str, quantized: bool) -> onnx.ModelProto:
    """tf2onnx's command, which alone can take integers for the floats that they mean."""
    from tf2onnx import convert as command

    given, sys.argv = (
        sys.argv,
        ["tf2onnx", "--tflite", path, "--output", onnx_file, "--opset", str(OPSET), *["--dequantize"] * quantized],
    )
    try:
        command.main()
    finally:
        sys.argv = given
    return onnx.load(onnx_file)


def _float_ends(model: onnx.ModelProto) -> None:
    """Inputs and outputs in the floats that their integers mean: boards take and give floats, and their engine quantizes at the file's edge."""
    graph, integers = model.graph, (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    made = {name: node for node in graph.node for name in node.output}
    gone: list[Any] = []
    for value in graph.input:
        if value.type.tensor_type.elem_type not in integers:
            continue
        last, found = value.name, []
        while len(readers.get(last, [])) == 1 and readers[last][0].op_type in (
            "Cast",
            "Sub",
            "Mul",
            "DequantizeLinear",
        ):
            found.append(readers[last][0])
            last = found[-1].output[0]
            if found[-1].op_type in ("Mul", "DequantizeLinear"):
                break
        if not found or found[-1].op_type not in ("Mul", "DequantizeLinear"):
            raise job.Refused(
                "bad_model", f"what the integers of input {value.name!r} mean can't be told from this .tflite"
            )
        gone += found
        for node in readers.get(last, []):
            node.input[:] = [value.name if name == last else name for name in node.input]
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for value in graph.output:
        if value.type.tensor_type.elem_type not in integers:
            continue
        rounding = made[value.name]
        if rounding.op_type != "QuantizeLinear":
            raise job.Refused(
                "bad_model", f"what the integers of output {value.name!r} mean can't be told from this .tflite"
            )
        gone.append(rounding)
        exact = rounding.input[0]
        for node in graph.node:
            node.input[:] = [value.name if name == exact else name for name in node.input]
            node.output[:] = [value.name if name == exact else name for name in node.output]
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    kept = [copied(node) for node in graph.node if not any(node is other for other in gone)]
    del graph.node[:]
    graph.node.extend(kept)
    onnx.checker.check_model(model)


def _told(made: Any) -> onnx.ModelProto:
    """What tf2onnx makes, or its refusal in words."""
    try:
        model: onnx.ModelProto = made()
        onnx.checker.check_model(model)
    except Exception as exc:  # tf2onnx raises whatever comes
        raise job.Refused("bad_model", f"this network can't be written as ONNX: {str(exc).splitlines()[0]}") from exc
    if not model.graph.node:  # it leaves away what it lacks, and all that hangs on that
        raise job.Refused("bad_model", "this network can't be written as ONNX: tf2onnx lacks an operator of it")
    return model


def _kept(model: onnx.ModelProto, function: Any, specs: list[Any]) -> onnx.ModelProto:
    """Tensors that the network keeps without their being variables (what a normalisation was adapted to) become constants: tf2onnx takes them for inputs."""
    graph = model.graph
    captured = {own.name: tensor for tensor, own in function.get_concrete_function(*specs).graph.captures}
    for value in [value for value in graph.input if value.name in captured]:
        graph.initializer.append(onnx.numpy_helper.from_array(captured[value.name].numpy(), value.name))
        graph.input.remove(value)
    return model


def _check(model: onnx.ModelProto, fed: dict[str, Any], wanted: list[Any]) -> None:
    run = onnx.reference.ReferenceEvaluator(model)
    for have, want in zip(run.run(None, fed), wanted, strict=True):
        off = float(np.abs(have - want).max()) / max(float(np.abs(want).max()), 1e-6)
        if have.shape != want.shape or not off <= CLOSE:
            raise job.Refused(
                "bad_model",
                f"as ONNX this network answers otherwise (by {off:.2g} of its largest output): tf2onnx got it wrong",
            )


def _plain(name: str) -> str:
    return name.split(":")[0].replace("/", "_")


def listed(value: Any) -> list[Any]:
    """What a network gives, by name, in a row or alone, as a row."""
    return (
        list(value.values())
        if isinstance(value, dict)
        else list(value)
        if isinstance(value, (list, tuple))
        else [value]
    )


def main() -> None:
    job.serve({"convert": convert})
