"""Requests that lie where earlier ones lay are computed in place, and never answered in a shape that was another request's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from edgefleet_agent.runtime.bound import MAX_PLACES, Bound
from edgefleet_agent.runtime.channel import Run
from edgefleet_agent.runtime.engines import find
from edgefleet_agent.runtime.engines.port import Session
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.errors import EngineError
from support import artifacts

SIZE = 6


class Memory:
    """A slot's inputs and answers, as the worker sees them."""

    def __init__(self, session: Session, gives: tuple[TensorSpec, ...]) -> None:
        self.session, self.bound = session, Bound(session, gives)
        self.x, self.answers = np.zeros((1, SIZE), np.float32), np.zeros(1024, np.uint8)
        self.answered_in_place = 0

    def ask(self, values: list[float], base: int = 0) -> np.ndarray:
        """What the worker would answer."""
        self.x[:] = values
        run = Run(1, 0, base, [(0, (1, SIZE))])
        place = self.bound.compute(run)
        if place is not None:
            self.answered_in_place += 1
            return place.outputs["y"].copy()
        value = self.session.run({"x": self.x})["y"]
        target: np.ndarray = np.ndarray(value.shape, value.dtype, self.answers)
        np.copyto(target, value)
        self.bound.learn(run, {"x": self.x}, {"y": target})
        return target.copy()


def session_of(folder: Path, nodes: list, constants: list, output: TensorSpec) -> Session:
    """An onnxruntime session of a network from ``x`` FP32 [1, SIZE] to ``y``."""
    from onnx import TensorProto as T
    from onnx import helper as h

    kind = {"FP32": T.FLOAT, "INT64": T.INT64}[output.datatype]
    shape = [n if n >= 0 else f"n{i}" for i, n in enumerate(output.shape)]
    graph = h.make_graph(nodes, "g", [h.make_tensor_value_info("x", T.FLOAT, [1, SIZE])],
                         [h.make_tensor_value_info("y", kind, shape)], constants)  # fmt: skip
    path = folder / "model.onnx"
    path.write_bytes(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9).SerializeToString())
    config = msgspec.structs.replace(
        artifacts.make_config(), inputs=(TensorSpec("x", "FP32", (1, SIZE)),), outputs=(output,)
    )
    return find("onnxruntime").load(path, config, threads=1)


@pytest.fixture
def doubling(tmp_path: Path) -> Memory:
    from onnx import helper as h

    spec = TensorSpec("y", "FP32", (1, SIZE))
    return Memory(session_of(tmp_path, [h.make_node("Add", ["x", "x"], ["y"])], [], spec), (spec,))


def positives(folder: Path, spec: TensorSpec, *, in_rows: bool) -> Memory:
    """A network that tells where ``x`` is above 0: as many of them as there are."""
    from onnx import helper as h
    from onnx import numpy_helper as nh

    found = "found" if in_rows else "y"
    nodes = [h.make_node("Greater", ["x", "zero"], ["above"]), h.make_node("NonZero", ["above"], [found])]
    if in_rows:
        nodes.append(h.make_node("Transpose", [found], ["y"]))
    constants = [nh.from_array(np.array(0, np.float32), "zero")]
    return Memory(session_of(folder, nodes, constants, spec), (spec,))


def test_the_second_request_in_a_place_is_computed_there(doubling: Memory) -> None:
    for values in ([1.0] * SIZE, [2.0] * SIZE, [-3.5] * SIZE):
        np.testing.assert_array_equal(doubling.ask(values), [[2 * v for v in values]])
    assert doubling.answered_in_place == 2


def test_places_are_told_apart_and_only_so_many_are_kept(doubling: Memory) -> None:
    for base in range(MAX_PLACES + 1):
        doubling.ask([1.0] * SIZE, base)
    assert doubling.answered_in_place == 0
    doubling.ask([1.0] * SIZE, MAX_PLACES)
    assert doubling.answered_in_place == 1
    doubling.ask([1.0] * SIZE, 0)  # the oldest made room
    assert doubling.answered_in_place == 1


def test_an_answer_whose_number_of_rows_depends_on_the_picture_is_never_given_another_ones_shape(
    tmp_path: Path,
) -> None:
    found = positives(tmp_path, TensorSpec("y", "INT64", (-1, 2)), in_rows=True)
    for count in (2, 2, 5, 1, 0, 6, 2):
        answer = found.ask([1.0] * count + [-1.0] * (SIZE - count))
        np.testing.assert_array_equal(answer, [[0, i] for i in range(count)] or np.empty((0, 2)))
    assert found.answered_in_place == 1  # the second; from the third on it is known that this can't be bound


def test_where_another_axis_is_open_nothing_is_bound(tmp_path: Path) -> None:
    found = positives(tmp_path, TensorSpec("y", "INT64", (2, -1)), in_rows=False)
    for _ in range(3):
        assert found.ask([1.0] * SIZE).shape == (2, SIZE)
    assert found.answered_in_place == 0


class Doubling:
    """A session that computes where it is told to ``good`` times, and then no more; with none it does not take the memory."""

    providers = ("fake",)

    def __init__(self, good: int) -> None:
        self.good = good

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": inputs["x"] * 2}

    def bind(self, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> Callable[[], None]:
        if not self.good:
            raise EngineError("not there")

        def compute() -> None:
            self.good -= 1
            if self.good < 0:
                raise EngineError("no")
            np.multiply(inputs["x"], 2, out=outputs["y"])

        return compute


@pytest.mark.parametrize("good", [0, 1])
def test_an_engine_that_fails_in_a_place_is_asked_the_usual_way_from_then_on(good: int) -> None:
    found = Memory(Doubling(good), (TensorSpec("y", "FP32", (1, SIZE)),))
    for value in (1.0, 2.0, 3.0, 4.0):
        np.testing.assert_array_equal(found.ask([value] * SIZE), [[2 * value] * SIZE])
    assert found.answered_in_place == good


def test_a_request_that_the_engine_refuses_in_either_way_takes_nothing_from_those_behind_it(tmp_path: Path) -> None:
    """One client's bad picture would make everybody's slower, for as long as the worker lives."""
    from onnx import helper as h

    spec = TensorSpec("y", "FP32", (1, SIZE))
    nodes = [h.make_node("Cast", ["x"], ["i"], to=7), h.make_node("GatherElements", ["x", "i"], ["y"], axis=1)]
    found = Memory(session_of(tmp_path, nodes, [], spec), (spec,))
    for _ in range(2):
        np.testing.assert_array_equal(found.ask([1.0] * SIZE), [[1.0] * SIZE])
    for _ in range(2):
        with pytest.raises(EngineError):
            found.ask([1000.0] * SIZE)  # there is no such place
    np.testing.assert_array_equal(found.ask([2.0] * SIZE), [[2.0] * SIZE])
    assert found.answered_in_place == 2
