"""Stage 1, source: one form for what tf2onnx writes. Receives its network, hands on the same with an order and names that follow from the graph alone, so that the
same file makes the same version."""

from __future__ import annotations

import itertools
import re
from typing import Any

import onnx

from . import job

EINSUM = re.compile(r"einsum\d{9,}\w*")  # by its address in that process, and by what a constant was first made for


def canonical(model: onnx.ModelProto, inputs: list[str], outputs: list[str]) -> None:
    """Give inputs and outputs the names that Keras has for them, and all else an order and names that follow from the graph alone: tf2onnx numbers
    what it adds in an order that differs from run to run."""
    graph = model.graph
    inside = [node.name for node in graph.node if any(a.HasField("g") or a.graphs for a in node.attribute)]
    if inside:
        raise job.Refused(
            "bad_model", f"this network has branches or loops that depend on values, which can't be served: {', '.join(inside)}",
            "a recurrent layer (LSTM, GRU) over a fixed number of steps is none with unroll=True: set it, and save the model again",
        )  # fmt: skip
    made = {name: node for node in graph.node for name in node.output}
    constants = {i.name: i for i in graph.initializer}
    new: dict[str, str] = dict(zip([v.name for v in graph.input], inputs, strict=True)) | dict(
        zip([v.name for v in graph.output], outputs, strict=True)
    )
    taken = set(new.values())

    def name_for(old: str) -> str:
        if old and old not in new:
            stem = re.sub(r"__\d+|:\d+$", "", EINSUM.sub("einsum", old)) or "value"
            numbers = (f"{stem}_{n}" for n in itertools.count(1))
            chosen: str = next(name for name in itertools.chain([stem], numbers) if name not in taken)
            new[old] = chosen
            taken.add(chosen)
        return new.get(old, "")

    ordered: list[Any] = []
    used: list[Any] = []
    done: set[int] = set()
    todo = [(made[value.name], False) for value in reversed(graph.output)]
    while todo:  # depth first, inputs in their order
        node, ready = todo.pop()
        if id(node) in done:
            continue
        if not ready:
            todo.append((node, True))
            todo += [
                (made[name], False) for name in reversed(node.input) if name in made and id(made[name]) not in done
            ]
            continue
        done.add(id(node))
        ordered.append(node)
        used += [constants.pop(name) for name in node.input if name in constants]
    for node in ordered:
        node.input[:] = [name_for(name) for name in node.input]
        node.output[:] = [name_for(name) for name in node.output]
        node.name = f"{node.op_type}/{node.output[0]}"
    for tensor in used:
        tensor.name = name_for(tensor.name)
    for value in (*graph.input, *graph.output):
        value.name = new[value.name]
    kept, weights = [copied(node) for node in ordered], [copied(tensor) for tensor in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.initializer.extend(weights)
    graph.name = "network"


def copied(message: Any) -> Any:
    """A message of its own, which lives on when the one that it was part of is cleared."""
    own = type(message)()
    own.CopyFrom(message)
    return own
