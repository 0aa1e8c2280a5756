"""Stage 2, compile: TensorFlow's own converter. Receives a Keras model or a SavedModel as it was handed in, hands on .tflite files.

The file is looked at and loaded as :mod:`.tensorflow_source` does it. It is converted twice where int8 is wanted: the float file is held against the
network first, because the converter orders and names inputs and outputs as it likes, and int8 answers would not tell. What leaves here
has the served names and order, a signature, and constants at the schema's alignment, like the files of :mod:`.litert`.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import job, tensorflow_source
from .measure import Array, SampleFile
from .tflite.file import packed

MAX_FILES, MAX_BYTES = 1000, 2**31  # of a SavedModel
CLOSE = tensorflow_source.CLOSE
SUFFIXES = {"keras": ".keras", "keras-h5": ".h5"}


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``original``, ``format`` (of :mod:`edgefleet_controller.source.formats`; a SavedModel as a ZIP archive), ``inputs`` and ``outputs`` (served
    names, in order), ``calibration``, ``jobs`` (each ``recipe`` and ``compiled``, the file to write)."""
    progress("loading TensorFlow", 0, 1)
    function, specs, names = tensorflow_source.load(placed(request["original"], request["format"]), request["format"])
    if [spec.name for spec in specs] != request["inputs"] or names != request["outputs"]:
        raise job.Refused("bad_model", "the file has other inputs or outputs than the network that was made of it")
    frozen = _frozen(function, specs)
    progress("converting with TensorFlow", 0, len(request["jobs"]) + 1)
    plain = _converted(frozen, None)
    _check(plain, function, specs)
    for number, one in enumerate(request["jobs"], 1):
        progress("converting with TensorFlow", number, len(request["jobs"]) + 1)
        content = plain
        if one["recipe"]["precision"] == "int8":
            content = _converted(frozen, SampleFile(request["calibration"]), request["inputs"])
            if _ends(_parsed(content)) != _ends(_parsed(plain)):
                raise job.Refused(
                    "bad_model", "TensorFlow's converter gives the int8 file other ends than the float one"
                )
        Path(one["compiled"]).write_bytes(_served(content, request["inputs"], request["outputs"]))
    return {}


def try_out(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Make a tiny Keras network and convert it as any other. Result: ``told``, in words."""
    progress("loading TensorFlow", 0, 1)
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    given = keras.Input((16, 16, 3), name="image")
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu")(given)
    keras.Model(given, keras.layers.Dense(10)(keras.layers.Flatten()(x))).save("tiny.keras")
    function, specs, _ = tensorflow_source.load("tiny.keras", "keras")
    content = _converted(_frozen(function, specs), None)
    _check(content, function, specs)
    progress("loading TensorFlow", 1, 1)
    return {"told": f"a Keras network as a .tflite of {len(content)} bytes, by TensorFlow {tf.__version__}"}


def placed(blob: str, kind: str) -> str:
    """A blob, in this process' folder, as its format wants it: Keras goes by a file's name, a SavedModel is a folder."""
    folder = Path(tempfile.mkdtemp(dir=".", prefix="original-"))
    if kind != "saved-model":
        link = folder / f"original{SUFFIXES[kind]}"
        link.symlink_to(blob)
        return str(link)
    with zipfile.ZipFile(blob) as opened:
        entries = opened.infolist()
        if len(entries) > MAX_FILES or sum(entry.file_size for entry in entries) > MAX_BYTES:
            raise job.Refused("bad_model", "this SavedModel is too large")
        for entry in entries:
            target = folder / entry.filename
            if not target.resolve().is_relative_to(folder.resolve()):
                raise job.Refused("bad_model", f"this archive writes outside its folder: {entry.filename!r}")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(opened.read(entry))
    return str(folder)


def _frozen(function: Any, specs: list[Any]) -> Any:
    """The network as one function without variables, whose ends are numbered."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    def call(*given: Any) -> dict[str, Any]:
        # TensorFlow orders a dict by its keys: digits keep our order.
        return {f"out_{n:04}": value for n, value in enumerate(tf.nest.flatten(function(*given)))}

    numbered = [tf.TensorSpec(spec.shape, spec.dtype, name=f"in_{n}") for n, spec in enumerate(specs)]
    try:
        return convert_variables_to_constants_v2(tf.function(call, input_signature=numbered).get_concrete_function())
    except Exception as exc:  # TensorFlow raises whatever comes
        raise _refusal(exc) from exc


def _converted(frozen: Any, samples: SampleFile | None, inputs: list[str] | None = None) -> bytes:
    """The converter's file: in float, or int8 over the samples, where what has no int8 kernel stays in float."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_concrete_functions([frozen])
    if samples is not None:
        sets = tf.lite.OpsSet

        def shown() -> Iterator[list[Array]]:
            for number in range(len(samples)):
                sample = samples[number]
                yield [sample[name] for name in inputs or ()]

        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = shown
        converter.target_spec.supported_ops = [sets.TFLITE_BUILTINS_INT8, sets.TFLITE_BUILTINS]
    try:
        return bytes(converter.convert())
    except Exception as exc:
        raise _refusal(exc) from exc


def _refusal(exc: Exception) -> job.Refused:
    lines = [line for line in str(exc).splitlines() if line.strip()]
    return job.Refused(
        "bad_model",
        f"TensorFlow's own converter can't take this network: {lines[0][:400] if lines else type(exc).__name__}",
    )


def _check(content: bytes, function: Any, specs: list[Any]) -> None:
    """Hold the float file against the network, input by input and output by output, on one random sample."""
    import tensorflow as tf

    interpreter = tf.lite.Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    details = interpreter.get_input_details()
    if [detail["name"].split(":")[0] for detail in details] != [f"in_{n}" for n in range(len(specs))]:
        raise job.Refused(
            "bad_model", "TensorFlow's converter leaves out an input that nothing reads, or orders them otherwise"
        )
    fed = tensorflow_source.drawn(specs)
    for detail, value in zip(details, fed, strict=True):
        interpreter.set_tensor(detail["index"], value)
    interpreter.invoke()
    answered = [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]
    wanted = [value.numpy() for value in tf.nest.flatten(function(*fed))]
    for have, want in zip(answered, wanted, strict=True):
        off = (
            float(np.abs(have - want).max()) / max(float(np.abs(want).max()), 1e-6)
            if have.shape == want.shape
            else np.inf
        )
        if not off <= CLOSE:
            raise job.Refused("bad_model", f"as TensorFlow converts it this network answers otherwise (by {off:.2g})")


def _parsed(content: bytes) -> Any:
    from tensorflow.lite.python import schema_py_generated as schema

    return schema.ModelT.InitFromPackedBuf(content, 0)


def _ends(model: Any) -> list[tuple[bytes, tuple[int, ...]]]:
    """Names and shapes of the inputs and outputs, in order."""
    graph = model.subgraphs[0]
    tensors = [graph.tensors[place] for place in (*graph.inputs, *graph.outputs)]
    return [(tensor.name, tuple(int(size) for size in tensor.shape)) for tensor in tensors]


def _served(content: bytes, inputs: list[str], outputs: list[str]) -> bytes:
    """The file with the served names, in its tensors and as its one signature, and with aligned constants."""
    from tensorflow.lite.python import schema_py_generated as schema

    model = _parsed(content)
    graph = model.subgraphs[0]
    if any(buffer.offset for buffer in model.buffers):
        raise job.Refused(
            "bad_model", "TensorFlow's converter puts these constants where older interpreters don't look"
        )
    ends = [*graph.inputs, *graph.outputs]
    if len(set(ends)) != len(ends):
        raise job.Refused(
            "bad_model", "two inputs or outputs of this network are one tensor after TensorFlow's converter"
        )
    named = dict(zip((int(place) for place in ends), [*inputs, *outputs], strict=True))
    for place, name in named.items():
        graph.tensors[place].name = name
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = "serving_default", 0
    signature.inputs, signature.outputs = [], []
    for side, places in ((signature.inputs, graph.inputs), (signature.outputs, graph.outputs)):
        for place in places:
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = named[int(place)], int(place)
            side.append(entry)
    model.signatureDefs = [signature]
    return packed(model)


def main() -> None:
    os.environ |= {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
    job.serve({"compile": compile_model, "try_out": try_out})
