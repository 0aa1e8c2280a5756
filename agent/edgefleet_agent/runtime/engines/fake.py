"""Engine adapter without a library: receives a JSON file that says how to behave, hands on a session that does.

The public fake of the engine port (STYLE, "every port ships a fake"): for whoever tests an agent, a rollout or a board without a
model. Not in the entry points; tests register it. ``{"scale": 2.0, "offset": 1.0}``: the output is the mean over all axes but the first of
every input, times scale plus offset, spread over the output's shape.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.errors import EngineError
from edgefleet_shared.malformed import MALFORMED

from edgefleet_agent.runtime.tensors import NUMPY, Array


class FakeModel(msgspec.Struct, frozen=True):
    """What the fake computes: ``mean(inputs) * scale + offset``."""

    scale: float = 1.0
    offset: float = 0.0
    providers: tuple[str, ...] = ("CPU",)


class FakeEngine:
    name = "fake"

    def available(self) -> str | None:
        return "1.0"

    def missing(self) -> str:
        return ""

    def load_library(self) -> None:
        """There is none."""

    def load(self, path: Path, config: ModelConfig, threads: int) -> FakeSession:
        try:
            model = msgspec.json.decode(path.read_bytes(), type=FakeModel)
        except (OSError, *MALFORMED) as exc:
            raise EngineError(f"not a fake model: {exc}") from exc
        return FakeSession(model, config)


class FakeSession:
    def __init__(self, model: FakeModel, config: ModelConfig) -> None:
        self._model, self._config = model, config

    @property
    def providers(self) -> tuple[str, ...]:
        return self._model.providers

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        expected = {spec.name for spec in self._config.inputs}
        if set(inputs) != expected:
            raise EngineError(f"inputs are {sorted(inputs)}, the model has {sorted(expected)}")
        rows = len(next(iter(inputs.values())))
        mean = sum(a.reshape(rows, -1).astype(np.float64).mean(axis=1) for a in inputs.values())
        level = np.asarray(mean) * self._model.scale + self._model.offset
        outputs = {}
        for spec in self._config.outputs:
            rest = tuple(abs(n) for n in spec.shape[1:])
            spread = np.broadcast_to(level.reshape(rows, *(1 for _ in rest)), (rows, *rest))
            outputs[spec.name] = np.ascontiguousarray(spread).astype(NUMPY[spec.datatype])
        return outputs
