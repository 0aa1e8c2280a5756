"""Stage 2, compile: float islands in an int8 .tflite. Receives a quantized file's bytes, hands on the same without needless islands.

Outputs that lie on the shore of one are put right too, and what reads them. ai-edge-quantizer 0.10 leaves some operators in float between a DEQUANTIZE and a QUANTIZE although TFLite's kernels compute them
in int8 with any two scales. Those are joined: the operator takes what the one reads and makes what the other writes.
"""

from __future__ import annotations

from typing import Any

from ai_edge_litert import schema_py_generated as schema

from .file import packed, unpacked

_CODES = schema.BuiltinOperator
# Kernels that rescale from the input's scale to the output's by themselves, in LiteRT and in tflite-runtime.
JOINED = frozenset({_CODES.LEAKY_RELU, _CODES.RELU, _CODES.RELU6, _CODES.RELU_N1_TO_1, _CODES.ELU})


def joined(content: bytes) -> bytes:
    """The file without the islands of :data:`JOINED` operators; its inputs, outputs and answers stay, but for a rounding less."""
    model = unpacked(schema, content)
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    served = {int(output.tensorIndex) for signature in model.signatureDefs or [] for output in signature.outputs}
    for subgraph in model.subgraphs:
        _serve(subgraph, codes, served)
        _read_in_int8(subgraph, codes)
        _join(subgraph, codes)
    return packed(model)


def _serve(subgraph: Any, codes: list[int], served: set[int]) -> None:
    """Make what the signature names the outputs again: of one that is computed in float and read in int8 inside, ai-edge-quantizer 0.10 puts the int8 form
    in its place, and nobody can ask for it."""
    makers = {int(tensor): operator for operator in subgraph.operators for tensor in operator.outputs}
    outputs = [int(tensor) for tensor in subgraph.outputs]
    for place, tensor in enumerate(outputs):
        maker = makers.get(tensor)
        if maker is not None and codes[maker.opcodeIndex] == _CODES.QUANTIZE and int(maker.inputs[0]) in served:
            outputs[place] = int(maker.inputs[0])
    subgraph.outputs = outputs


def _read_in_int8(subgraph: Any, codes: list[int]) -> None:
    """Have what makes int8 read int8. Of a value that comes out and whose RESHAPE or TRANSPOSE comes out too, ai-edge-quantizer 0.10 hands that operator the
    float form, though it only moves numbers: it would make bytes of floats."""
    makers = {int(tensor): operator for operator in subgraph.operators for tensor in operator.outputs}
    for operator in subgraph.operators:
        read, made = (subgraph.tensors[tensors[0]] for tensors in (operator.inputs, operator.outputs))
        before = makers.get(int(operator.inputs[0]))
        if (
            codes[operator.opcodeIndex] != _CODES.QUANTIZE
            and (read.type, made.type) == (schema.TensorType.FLOAT32, schema.TensorType.INT8)
            and before is not None
            and codes[before.opcodeIndex] == _CODES.DEQUANTIZE
        ):
            operator.inputs = [int(before.inputs[0]), *(int(tensor) for tensor in operator.inputs[1:])]


def _join(subgraph: Any, codes: list[int]) -> None:
    makers = {int(tensor): operator for operator in subgraph.operators for tensor in operator.outputs}
    users: dict[int, list[Any]] = {int(tensor): [] for tensor in subgraph.outputs}
    served = set(users)
    for operator in subgraph.operators:
        for tensor in operator.inputs:
            users.setdefault(int(tensor), []).append(operator)
    gone: list[Any] = []
    for operator in subgraph.operators:
        before, result = makers.get(int(operator.inputs[0])), int(operator.outputs[0])
        after = users.get(result, [])
        if (
            codes[operator.opcodeIndex] not in JOINED
            or before is None
            or codes[before.opcodeIndex] != _CODES.DEQUANTIZE
            or not after
            or any(codes[user.opcodeIndex] != _CODES.QUANTIZE for user in after)
            or result in served
            or any(
                subgraph.tensors[t].type != schema.TensorType.INT8
                for t in (before.inputs[0], *(u.outputs[0] for u in after))
            )
        ):
            continue
        widest = max(after, key=lambda user: float(subgraph.tensors[user.outputs[0]].quantization.scale[0]))
        users[int(operator.inputs[0])].remove(operator)
        operator.inputs, operator.outputs = [int(before.inputs[0])], [int(widest.outputs[0])]
        for user in after:  # with other scales: from int8 to int8
            user.inputs = list(operator.outputs)
        gone.append(widest)
        if not users[int(before.outputs[0])] and int(before.outputs[0]) not in served:
            gone.append(before)
    left = {id(operator) for operator in gone}
    kept = [operator for operator in subgraph.operators if id(operator) not in left]
    subgraph.operators = kept
