"""Inferences whose tensors lie where those of an earlier request lay: receives a Run, hands on outputs that are in its slot already.

A client sends the same kind of request again and again, and there are few slots. The first one in a place is computed as the engine
takes it; from it the engine learns where inputs and outputs lie (:class:`~edgefleet_agent.runtime.engines.port.Binder`), and the others there
cost neither arrays nor a copy. Only shapes that an answer may have had by chance could be wrong the next time: then the engine refuses
what it answers the usual way, and nothing is bound any more. What it refuses in either way was the request's doing. Runs in the worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.errors import EngineError

from edgefleet_agent.runtime.channel import Run
from edgefleet_agent.runtime.engines.port import Binder, Session
from edgefleet_agent.runtime.tensors import Array

MAX_PLACES = 64  # kept; a client whose requests change in length all the time gains nothing, and costs no memory


class Place(NamedTuple):
    """What was learned of one place. ``compute`` fills ``outputs`` from ``inputs``; ``shapes`` are those of ``outputs``, in the config's order."""

    compute: Callable[[], None]
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    shapes: list[tuple[int, ...]]


class Bound:
    """The places that a session knows.

    Args:
        gives: the outputs that the config promises. Where an axis other than the first is open, nothing is bound.
    """

    def __init__(self, session: Session, gives: tuple[TensorSpec, ...]) -> None:
        fixed = all(n >= 0 for spec in gives for n in spec.shape[1:])
        self._binder = session if fixed and isinstance(session, Binder) else None
        self._places: dict[tuple[object, ...], Place] = {}
        self._failed_in_place = False  # the request that is computed now

    def compute(self, run: Run) -> Place | None:
        """Compute a request where an earlier one lay; None when there was none, or it failed there: then it is not computed."""
        place = self._places.get(_key(run))
        self._failed_in_place = False
        if place is None:
            return None
        try:
            place.compute()
        except EngineError:
            # Whether it is this request or this way of asking, the usual way will tell.
            self._failed_in_place = True
            return None
        return place

    def learn(self, run: Run, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        """``run`` was answered the usual way; ``inputs`` and ``outputs`` lie in its slot."""
        if self._failed_in_place:
            self._binder = None
            self._places.clear()
        if self._binder is None or any(not a.nbytes for tensors in (inputs, outputs) for a in tensors.values()):
            return
        try:
            compute = self._binder.bind(inputs, outputs)
        except EngineError:
            self._binder = None  # the usual way does it
            return
        if compute is None:
            return
        if len(self._places) >= MAX_PLACES:
            del self._places[next(iter(self._places))]
        self._places[_key(run)] = Place(compute, inputs, outputs, [a.shape for a in outputs.values()])


def _key(run: Run) -> tuple[object, ...]:
    return (run.slot, run.base, *run.tensors)
