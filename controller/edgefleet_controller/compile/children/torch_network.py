"""Stage 2, compile: an ONNX network as a torch module that can be trained, and back. For :mod:`.prune`.

onnx2torch makes the module; on the way back only weights (and the groups of convolutions) are written into the ONNX graph that was
read, so that nodes keep their names, operators and order, and whatever was said about a node holds for the pruned network too.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from . import job

# Operator -> where its weights lie among its inputs, and under which name in torch's module.
_PLACES = {
    "Conv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "Gemm": {1: "weight", 2: "bias"},
    "BatchNormalization": {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"},
    "InstanceNormalization": {1: "weight", 2: "bias"},
    "LayerNormalization": {1: "weight", 2: "bias"},
    "PRelu": {1: "weight"},
}
_REDUCTIONS = (
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSumSquare",
)
_OF_FEW_BITS = {"saturate", "round_mode"}  # attributes that concern numbers of 8 bits and less alone
PRUNED = ("Conv", "ConvTranspose", "Gemm")  # whose weights are counted, and go
# Operators that take as many channels as they always did, or behind which torch-pruning would look for them in the wrong places: a dense layer
# behind a Transpose has those of each pixel side by side, as Keras has them.
_COUNTING = ("Transpose", "Gather", "MatMul", "DepthToSpace")
_CHANNELS = {1, -3}  # their axis
MOST_NAMED = 3  # nodes in an error


def _torchvision_stubs() -> dict[str, types.ModuleType]:
    """onnx2torch imports torchvision for two operators of region proposals; we have none, and it is as large as torch."""
    package, ops = types.ModuleType("torchvision"), types.ModuleType("torchvision.ops")
    ops.roi_align = None  # type: ignore[attr-defined]
    package.ops = ops  # type: ignore[attr-defined]
    return {"torchvision": package, "torchvision.ops": ops}


@functools.cache
def _teach_newer_operators() -> None:
    """onnx2torch 1.5 ends at operator set 17. Later versions of an operator that take what the last one it knows takes are converted like that one (most only
    compute in more types), and reductions, whose axes have become an input, by their axes there. Slopes that are one channel's each become weights of a layer:
    onnx2torch hands them to a function, where torch-pruning does not see them."""
    from onnx2torch.node_converters import reduce, registry
    from onnx2torch.utils.common import OnnxMapping, OperationConverterResult, get_const_value

    for version in (7, 9, 16):
        of_slopes = registry.OperationDescription("", "PRelu", version)
        registry._CONVERTER_REGISTRY[of_slopes] = _sloped(registry._CONVERTER_REGISTRY[of_slopes])
    known = dict(registry._CONVERTER_REGISTRY)
    newest: dict[str, int] = {}
    for told in known:
        if told.domain == "":
            newest[told.operation_type] = max(told.version, newest.get(told.operation_type, 0))

    def reduced(node: Any, graph: Any) -> Any:
        given = node.input_values[1] if len(node.input_values) > 1 else None
        axes = None if given is None else get_const_value(given, graph).tolist()
        if not axes and node.attributes.get("noop_with_empty_axes"):
            raise NotImplementedError(f"{node.operation_type} without axes")
        module = reduce.OnnxReduceStaticAxes(node.operation_type, axes, node.attributes.get("keepdims", 1))
        return OperationConverterResult(module, OnnxMapping((node.input_values[0],), node.output_values))

    for schema in onnx.defs.get_all_schemas_with_history():
        last = newest.get(schema.name, 0)
        if schema.domain != "" or not last or schema.since_version <= last:
            continue
        before = onnx.defs.get_schema(schema.name, max_inclusive_version=last)
        if [one.name for one in schema.inputs] == [one.name for one in before.inputs]:
            of_old = known[registry.OperationDescription("", schema.name, last)]
            registry.add_converter(schema.name, schema.since_version)(_as_before(of_old, schema, before))
        elif schema.name in _REDUCTIONS:
            registry.add_converter(schema.name, schema.since_version)(reduced)


def _as_before(converter: Any, schema: Any, before: Any) -> Any:
    """A converter for a later version of an operator: that of an earlier one, for nodes that say nothing which the earlier one had no word for."""
    new = set(schema.attributes) - set(before.attributes) - _OF_FEW_BITS

    def convert(node: Any, graph: Any) -> Any:
        if said := sorted(new & set(node.attributes)):
            raise NotImplementedError(f"{schema.name} with {', '.join(said)}")
        return converter(node, graph)

    return convert


def _sloped(converter: Any) -> Any:
    """A converter for PRelu that makes a layer with weights of it where slopes are constant and one channel's each."""
    from onnx2torch.utils.common import OnnxMapping, OperationConverterResult

    def convert(node: Any, graph: Any) -> Any:
        values, slopes = node.input_values
        if slopes not in graph.initializers or values not in graph.value_info:
            return converter(node, graph)
        slope, axes = graph.initializers[slopes].to_torch(), len(graph.value_info[values].type.tensor_type.shape.dim)
        channels = [axis for axis, size in enumerate(slope.shape, axes - slope.dim()) if size > 1]
        if channels not in ([], [1]):
            return converter(node, graph)
        layer = torch.nn.PReLU(slope.numel())
        layer.weight = torch.nn.Parameter(slope.reshape(-1).clone())
        return OperationConverterResult(layer, OnnxMapping((values,), node.output_values))

    return convert


class Misfit(Exception):
    """A node does not take what it is given; which and why, in words."""


class _Watched(torch.fx.Interpreter):  # type: ignore[misc]
    """Runs a module node by node; ``at`` is the one that runs, by its name in torch."""

    at = ""

    def run_node(self, n: Any) -> Any:
        self.at = str(n.target)
        return super().run_node(n)


class Network:
    """One network in both forms. ``module`` takes and gives tensors with a first axis of any size."""

    def __init__(self, path: str) -> None:
        self._model = onnx.load(path, load_external_data=False)
        _free_batch(self._model)
        self.inputs = [i.name for i in _fed(self._model)]
        self.outputs = [o.name for o in self._model.graph.output]
        self.module = self._as_torch()
        self._names = {node.output[0]: f"node_{number}" for number, node in enumerate(self._model.graph.node)}

    def _as_torch(self) -> Any:
        sys.modules |= _torchvision_stubs()
        import onnx2torch

        _teach_newer_operators()
        copy = onnx.ModelProto()
        copy.CopyFrom(self._model)
        for number, node in enumerate(copy.graph.node):
            node.name = f"node_{number}"  # modules are found again by it
        del copy.graph.value_info[:]
        try:
            return onnx2torch.convert(copy)
        except (NotImplementedError, ValueError, KeyError, RuntimeError, AssertionError) as exc:
            raise job.Refused(
                "bad_model", f"this network can't be trained, so not pruned: {exc}", "leave spec.prune away"
            ) from exc

    def _layers(self) -> Iterator[tuple[Any, Any]]:
        """(node, torch module) of every node that has weights."""
        modules = dict(self.module.named_modules())
        for node in self._model.graph.node:
            if node.op_type in _PLACES:
                module = modules.get(self._names[node.output[0]])
                if isinstance(
                    module, torch.nn.Sequential
                ):  # uneven pads (Keras' "same" with stride 2): a pad, then the convolution
                    module = module[-1]
                if module is not None and isinstance(getattr(module, "weight", None), torch.Tensor):
                    yield node, module

    def pruned_layers(self) -> list[Any]:
        """The modules whose weights may go."""
        return [module for node, module in self._layers() if node.op_type in PRUNED]

    def fixed_layers(self) -> list[Any]:
        """The modules whose outputs must all stay: they reach, through no other one with weights, an output of the network or a node that counts channels."""
        made = {name: node for node in self._model.graph.node for name in node.output}
        modules = {node.output[0]: module for node, module in self._layers() if node.op_type in PRUNED}
        found, todo, seen = [], list(self.outputs), set[str]()
        for node in self._counting():
            todo += node.input
        while todo:
            name = todo.pop()
            if name in seen or name not in made:
                continue
            seen.add(name)
            if name in modules:
                found.append(modules[name])
            else:
                todo += made[name].input
        return found

    def _counting(self) -> list[Any]:
        return [node for node in self._model.graph.node if self._counts(node)]

    def counting(self) -> str:
        """The nodes that work only on as many channels as there are, in words."""
        found = [_told(node) for node in self._counting()]
        return ", ".join(found[:MOST_NAMED]) + (f" and {len(found) - MOST_NAMED} more" if found[MOST_NAMED:] else "")

    def run(self, inputs: list[Any]) -> list[Any]:
        """The outputs.

        Raises:
            Misfit: a node does not take what it is given.
        """
        watched = _Watched(self.module)
        try:
            found = watched.run(*inputs)
        except (RuntimeError, ValueError, IndexError) as exc:  # torch's own, of shapes that don't meet
            nodes = {self._names[node.output[0]]: node for node in self._model.graph.node}
            at = nodes.get(watched.at)
            raise Misfit(f"{_told(at)}: {_first_line(exc)}" if at else _first_line(exc)) from exc
        return list(found) if isinstance(found, (tuple, list)) else [found]

    def _counts(self, node: Any) -> bool:
        """Whether a node works only on as many channels as there are, in their order."""
        constants = {i.name: i for i in self._model.graph.initializer}
        match node.op_type:
            case "Reshape":  # free are those that leave one axis beside that of the samples
                rest = (
                    numpy_helper.to_array(constants[node.input[1]])[1:].tolist() if node.input[1] in constants else []
                )
                return rest.count(-1) != 1 or any(size not in (-1, 1) for size in rest)
            case "Split":
                return any(a.name == "axis" and a.i in _CHANNELS for a in node.attribute)
            case "Slice":
                axes = constants.get(node.input[3]) if len(node.input) > 3 else None
                return axes is None or not _CHANNELS.isdisjoint(numpy_helper.to_array(axes).tolist())
            case "Add" | "Sub" | "Mul" | "Div":
                return any(int(np.prod(constants[name].dims)) > 1 for name in node.input if name in constants)
            case "PRelu":  # slopes that are one channel's each are weights, and go with it
                return not isinstance(self.module.get_submodule(self._names[node.output[0]]), torch.nn.PReLU)
            case other:
                return other in _COUNTING

    @property
    def softmax(self) -> list[bool]:
        """Of each output, whether it comes out of a softmax."""
        made = {name: node.op_type for node in self._model.graph.node for name in node.output}
        return [made[name] == "Softmax" for name in self.outputs]

    def weights(self) -> int:
        """How many weights there are in what may be pruned, zeros left out."""
        return sum(int(torch.count_nonzero(module.weight)) for module in self.pruned_layers())

    def size(self) -> int:
        """How many weights there are, zeros and all."""
        return sum(module.weight.numel() for module in self.pruned_layers())

    def save(self, path: str) -> None:
        """Write the network with its present weights."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        constants = {i.name: i for i in model.graph.initializer}
        nodes = {node.output[0]: node for node in model.graph.node}
        written: dict[str, Any] = {}
        for original, module in self._layers():
            node = nodes[original.output[0]]
            for place, attribute in _PLACES[node.op_type].items():
                value = getattr(module, attribute, None)
                if value is None or place >= len(node.input) or node.input[place] not in constants:
                    continue
                array = self._in_place(node, place, value.detach().numpy(), constants[node.input[place]])
                name = node.input[place]
                if name in written and not np.array_equal(written[name], array):
                    name = node.input[place] = f"{name}/{node.output[0]}"  # two nodes shared it
                    model.graph.initializer.append(numpy_helper.from_array(array, name))
                written[name] = array
                constants.get(name, model.graph.initializer[-1]).CopyFrom(numpy_helper.from_array(array, name))
            for attribute in node.attribute:
                if attribute.name == "group":
                    attribute.i = module.groups
        del model.graph.value_info[:]
        onnx.save(onnx.shape_inference.infer_shapes(model), path)

    @staticmethod
    def _in_place(node: Any, place: int, value: Any, before: onnx.TensorProto) -> Any:
        """A weight as the node takes it: torch's dense layers have it transposed, PRelu has it flat."""
        array = np.ascontiguousarray(value, dtype=np.float32)
        if node.op_type == "Gemm" and place == 1 and not any(a.name == "transB" and a.i for a in node.attribute):
            array = np.ascontiguousarray(array.T)
        rank = len(before.dims)
        if array.ndim < rank:
            array = (
                array.reshape([-1 if size > 1 else 1 for size in before.dims])
                if node.op_type == "PRelu"
                else array.reshape([1] * (rank - array.ndim) + [*array.shape])
            )
        return array


def _fed(model: onnx.ModelProto) -> list[Any]:
    given = {i.name for i in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in given]


def _free_batch(model: onnx.ModelProto) -> None:
    """Shapes written into Reshape that hold for a batch of 1, or for all channels, become such that hold for any: the first axis is copied,
    and where no other axis is inferred, the only one longer than 1 is, else the last."""
    constants = {i.name: i for i in model.graph.initializer}
    one_sample = _of_one_sample(model)
    for node in model.graph.node:
        if node.op_type == "Constant":
            continue
        if node.op_type != "Reshape" or node.input[1] not in constants:
            continue
        shape = numpy_helper.to_array(constants[node.input[1]]).copy()
        if len(shape) < 2:
            continue
        if shape[0] == 1 or (shape[0] == -1 and {node.input[0], node.output[0]} <= one_sample):
            shape[0] = 0
        if not (shape == -1).any():
            longer = np.flatnonzero(shape[1:] != 1) + 1
            shape[longer[0] if len(longer) == 1 else -1] = -1
        name = f"{node.input[1]}/{node.output[0]}/any"
        model.graph.initializer.append(numpy_helper.from_array(shape.astype(np.int64), name))
        node.input[1] = name


def _of_one_sample(model: onnx.ModelProto) -> set[str]:
    """Values whose first axis is 1 long: that of samples, as the network is given one at a time."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    sized = [*graph.value_info, *graph.input, *graph.output]
    return {v.name for v in sized if v.type.tensor_type.shape.dim and v.type.tensor_type.shape.dim[0].dim_value == 1}


def _told(node: Any) -> str:
    return f"{node.op_type} {node.name or node.output[0]!r}"


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]
