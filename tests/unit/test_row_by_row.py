"""Batches on models that take one sample at a time."""

from __future__ import annotations

import numpy as np
import pytest
from edgefleet_agent.runtime.engines.port import UnservedBatchError, row_by_row

BATCH = {"x": np.arange(12, dtype=np.float32).reshape(3, 4)}


def test_answers_are_put_together_along_the_batch_axis() -> None:
    answer = row_by_row(lambda inputs: {"y": inputs["x"] * 2}, BATCH)
    assert np.array_equal(answer["y"], BATCH["x"] * 2)


def test_a_recurrent_networks_steps_are_not_taken_for_samples() -> None:
    steps_first = lambda inputs: {"y": inputs["x"].reshape(4, 1)}  # noqa: E731
    assert row_by_row(steps_first, {"x": BATCH["x"][:1]})["y"].shape == (4, 1)
    with pytest.raises(UnservedBatchError, match=r"output y of one sample is \(4, 1\), without a batch axis"):
        row_by_row(steps_first, BATCH)


@pytest.mark.parametrize("inputs", [{"x": np.zeros((0, 4))}, {"x": np.zeros((2, 4)), "z": np.zeros((3, 1))}])
def test_a_batch_of_nothing_or_of_several_sizes_is_refused(inputs: dict[str, np.ndarray]) -> None:
    with pytest.raises(UnservedBatchError, match="one and the same first axis"):
        row_by_row(lambda one: one, inputs)
