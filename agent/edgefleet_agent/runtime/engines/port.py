"""The engine port: receives a model file and its config, hands on a session that answers. Where a model must first be built on the board
that runs it, :class:`Builder` is the other half.

An adapter is one file behind the entry point group ``edgefleet.engines``. It imports its library in :meth:`Engine.load_library`, so
that asking which engines a board has costs nothing, and only worker and accepting child, never the resident agent, pay
for one. Foreign exceptions become :class:`~edgefleet_shared.errors.EngineError` in the adapter.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
from edgefleet_shared.artifact import MODEL_LAYER, Layout, ModelConfig
from edgefleet_shared.errors import EngineError

from edgefleet_agent import plans
from edgefleet_agent.runtime.tensors import Array


class UnservedBatchError(EngineError):
    """What was asked is no batch that this model takes: the request's doing, and nothing that the model failed at."""


class Session(Protocol):
    """One loaded model. Used by one thread."""

    @property
    def providers(self) -> tuple[str, ...]:
        """What really computes (CPUExecutionProvider, CPU, XNNPACK, ...), as the library tells after loading."""
        ...

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Compute one request.

        Args:
            inputs: every input of ``ModelConfig.inputs`` by name, C-contiguous, of its datatype and a shape it serves.

        Returns:
            every output of ``ModelConfig.outputs`` by name, of its datatype.

        Raises:
            UnservedBatchError: the inputs are no batch that it takes. EngineError: the library refused or failed.
        """
        ...


@runtime_checkable
class Binder(Session, Protocol):
    """A session that can be told once where tensors lie, and then computes there without looking at each of them again."""

    def bind(self, inputs: dict[str, Array], outputs: dict[str, Array]) -> Callable[[], None] | None:
        """Prepare inferences from ``inputs`` into ``outputs``, whatever they hold by then.

        Args:
            inputs: as for :meth:`Session.run`; shapes that were answered before.
            outputs: C-contiguous, of the datatypes and shapes of that answer.

        Returns:
            what computes one, and raises :class:`EngineError` when the library refuses or failed, as it does where an output has
            another shape this time; None where a batch is computed row by row.

        Raises:
            EngineError: the library does not take such memory.
        """
        ...


class Engine(Protocol):
    """An inference library."""

    name: str

    def available(self) -> str | None:
        """The library's version when this board has it, else None. Imports nothing."""
        ...

    def missing(self) -> str:
        """What this board lacks for the engine, for people; empty when it has it."""
        ...

    def load_library(self) -> Any:
        """Import the library and return what :meth:`load` uses of it. Repeating it costs nothing.

        Raises:
            EngineError: it is missing, or does not load on this board.
        """
        ...

    def load(self, path: Path, config: ModelConfig, threads: int) -> Session:
        """Load the compiled model at ``path``.

        Args:
            config: what is served: names, datatypes and shapes of inputs and outputs.
            threads: how many threads one request may use, 1 or more.

        Raises:
            EngineError: library missing, file not loadable, or its inputs and outputs differ from ``config``.
        """
        ...


@runtime_checkable
class Builder(Engine, Protocol):
    """An engine that runs no model as it comes: it makes a plan of it, on the very board, in the state ``building``. For such an engine
    the path that :meth:`Engine.load` is given is a plan's."""

    def build_key(self) -> str:
        """What a plan made here and now depends on: the engine's version, the driver's, the processor. One that was made under another
        key is made again.

        Raises:
            EngineError: the library does not load, or no device answers.
        """
        ...

    def build(
        self,
        source: Path,
        config: ModelConfig,
        memory_bytes: int,
        plan: BinaryIO,
        told: Callable[[str, int, int], None],
    ) -> None:
        """Make a plan.

        Args:
            source: the artifact's model.
            memory_bytes: what this process may hold; it is killed above that.
            plan: where the plan goes, from its beginning to its end; it can't be sought.
            told: what is done now, and how many of how many steps of it are done.

        Raises:
            EngineError: the model can't be built.
        """
        ...


def loadable(engine: Engine, layout: Layout, manifest: str) -> Path:
    """The file of an artifact that ``engine`` loads: its model, whose bytes the caller has checked, or the plan that was made of it here,
    whose bytes are checked now.

    Raises:
        NotFoundError: no plan was made by this engine as it is now. ArtifactError: the plan was changed on the disk.
        EngineError: the library does not load.
    """
    if not isinstance(engine, Builder):
        return layout.path(layout.manifest(manifest).layer(MODEL_LAYER).digest)
    engine.load_library()
    return plans.find(layout, manifest, engine.build_key())


def installed_version(*distributions: str) -> str | None:
    """The version of the first of ``distributions`` that is installed here."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def row_by_row(run_one: Callable[[dict[str, Array]], dict[str, Array]], inputs: dict[str, Array]) -> dict[str, Array]:
    """Answer a batch on a model whose file has a fixed batch of 1.

    Args:
        run_one: computes inputs whose first axis is 1.
        inputs: all with one and the same first axis N.

    Raises:
        UnservedBatchError: the first axes differ, N is 0, or an output has no batch axis that the answers could be put together along.
    """
    counts = {a.shape[0] if a.ndim else 0 for a in inputs.values()}
    if len(counts) != 1 or counts == {0}:
        raise UnservedBatchError(
            f"a batch needs one and the same first axis above 0 in every input, not {sorted(counts)}"
        )
    (count,) = counts
    if count == 1:
        return run_one(inputs)
    rows = [run_one({k: np.ascontiguousarray(v[i : i + 1]) for k, v in inputs.items()}) for i in range(count)]
    for name, value in rows[0].items():
        if value.shape[:1] != (1,):
            raise UnservedBatchError(
                f"output {name} of one sample is {value.shape}, without a batch axis; send samples one by one"
            )
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
