"""Stage 1, source: operators of TensorFlow that tf2onnx lacks. Receives tf2onnx, hands on nothing: it knows them from then on. For :mod:`.tensorflow_source`."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


@functools.cache
def teach() -> None:
    """Register what is missing in tf2onnx 1.17: ``Erfc``, which Keras' own gelu is made of, in all networks with a ``gelu`` that is not told to approximate."""
    from tf2onnx.handler import tf_op

    @tf_op("Erfc")
    class Erfc:
        @classmethod
        def version_9(cls, ctx: Any, node: Any, **_: Any) -> None:
            """``1 - erf(y)``; of ``-x * c``, as gelu has it, ``1 + erf(x * c)``, by which everything behind knows a gelu."""
            kind, shape, dtype = "Sub", ctx.get_shape(node.output[0]), ctx.get_dtype(node.output[0])
            one = ctx.make_const(f"{node.name}/one", np.array(1, dtype=_numpy(dtype))).output[0]
            inner = node.input[0]
            product = node.inputs[0]
            turned = [place for place, maker in enumerate(product.inputs) if maker is not None and maker.type == "Neg"]
            if product.type == "Mul" and len(turned) == 1:
                given = list(product.input)
                given[turned[0]] = product.inputs[turned[0]].input[0]
                inner, kind = ctx.make_node("Mul", given, shapes=[shape], dtypes=[dtype]).output[0], "Add"
            erf = ctx.make_node("Erf", [inner], shapes=[shape], dtypes=[dtype]).output[0]
            ctx.remove_node(node.name)
            ctx.make_node(kind, [one, erf], name=node.name, outputs=node.output, shapes=[shape], dtypes=[dtype])


def _numpy(dtype: int) -> Any:
    from onnx import helper

    return helper.tensor_dtype_to_np_dtype(dtype)
