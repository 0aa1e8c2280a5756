"""Stage 2, compile: a Keras 3 network as one of tf_keras that tfmot can prune, and its weights back. For :mod:`.keras_prune`.

tfmot knows Keras 2 only. Layer by layer the network is built again in tf_keras, from each layer's own configuration, along the graph that Keras 3
has of it, and given its weights; what it then answers is held against what the network answered. A layer that tf_keras lacks, or means otherwise
by, is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import job
from .tensorflow_source import listed

PRUNED = (
    "Dense",
    "Conv1D",
    "Conv2D",
    "Conv2DTranspose",
    "Conv3D",
    "Conv3DTranspose",
)  # whose kernels are counted, and go
CLOSE = 1e-3  # of the largest output
RENAMED = {"negative_slope": "alpha"}  # of LeakyReLU, by another name in Keras 2
_HINT = "the ONNX form can be pruned all the same"


class Network:
    """One network in both forms.

    Args:
        model: of Keras 3, functional or sequential.
        wrap: puts around a layer of tf_keras what prunes it.
    """

    def __init__(self, model: Any, wrap: Callable[[Any], Any]) -> None:
        import tf_keras

        self._model, self._wrap = model, wrap
        self._layers: dict[int, tuple[Any, Any, Any]] = {}  # by id: of Keras 3, of tf_keras, and what is called
        given = [
            tf_keras.Input(tuple(tensor.shape[1:]), dtype=str(tensor.dtype), name=f"in_{n}")
            for n, tensor in enumerate(model.inputs)
        ]
        found = self._through(model, given)
        self.module = tf_keras.Model(given, list(found))
        for layer, twin, _ in self._layers.values():
            try:
                twin.set_weights(layer.get_weights())
            except ValueError as exc:
                raise _refused(layer, "has other weights there") from exc
        self._check()

    def save(self, path: str) -> None:
        """Write the Keras 3 network with the weights that it has in tf_keras now."""
        for layer, twin, _ in self._layers.values():
            layer.set_weights(twin.get_weights())
        self._model.save(path)

    def kernels(self) -> Iterator[Any]:
        """The weights that may go."""
        for layer, twin, _ in self._layers.values():
            if type(layer).__name__ in PRUNED:
                yield twin.kernel

    def _through(self, model: Any, given: list[Any]) -> list[Any]:
        graph = getattr(model, "_functional", model)  # what a sequential one is inside
        if not hasattr(graph, "_run_through_graph"):
            raise job.Refused(
                "bad_model",
                f"{type(model).__name__} {model.name!r} is no graph of layers, so not pruned by tfmot",
                _HINT,
            )
        found = graph._run_through_graph(given, operation_fn=lambda operation: operation, call_fn=self._called)
        return listed(found)

    def _called(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        import keras

        if isinstance(operation, (keras.Sequential, keras.Model)):
            found = self._through(operation, list(keras.tree.flatten(args)))
            return found if len(found) > 1 else found[0]
        if id(operation) not in self._layers:
            self._layers[id(operation)] = self._rebuilt(operation)
        _, twin, called = self._layers[id(operation)]
        # As everywhere else in edgefleet: normalisation keeps the statistics that it was trained with, and nothing is dropped.
        if called is twin and "training" in inspect.signature(twin.call).parameters:
            kwargs["training"] = False
        try:
            return called(*args, **kwargs)
        except Exception as exc:  # tf_keras raises whatever comes
            raise _refused(operation, f"can't be called there: {_first_line(exc)}") from exc

    def _rebuilt(self, layer: Any) -> tuple[Any, Any, Any]:
        import keras
        import tf_keras

        kind = type(layer).__name__
        made = getattr(tf_keras.layers, kind, None)
        if not isinstance(layer, keras.layers.Layer) or made is None:
            raise _refused(layer, "is missing there")
        known = {name for base in made.__mro__ for name in inspect.signature(base.__init__).parameters}
        config = {
            RENAMED.get(name, name) if kind == "LeakyReLU" else name: value
            for name, value in layer.get_config().items()
        }
        # Weights come over as they are; that they are not pulled about by what they were trained with is meant.
        config = {
            name: value for name, value in config.items()
            if (name in known or name in ("name", "trainable")) and not name.endswith(("_initializer", "_regularizer", "_constraint"))
        } | {"dtype": "float32"}  # fmt: skip
        try:
            twin = made.from_config(config)
        except Exception as exc:
            raise _refused(layer, f"can't be made there: {_first_line(exc)}") from exc
        return layer, twin, self._wrap(twin) if kind in PRUNED else twin

    def _check(self) -> None:
        import keras

        chance = np.random.default_rng(0)
        fed = [chance.random((2, *tensor.shape[1:])).astype(tensor.dtype) for tensor in self._model.inputs]
        want = keras.tree.flatten(self._model(fed if len(fed) > 1 else fed[0], training=False))
        have = self.module(fed if len(fed) > 1 else fed[0], training=False)
        for mine, theirs in zip(have if isinstance(have, (list, tuple)) else [have], want, strict=True):
            off = float(np.abs(np.array(mine) - np.array(theirs)).max()) / max(
                float(np.abs(np.array(theirs)).max()), 1e-6
            )
            if not off <= CLOSE:
                raise job.Refused(
                    "bad_model",
                    f"rebuilt in tf_keras this network answers otherwise (by {off:.2g}), so it is not pruned by tfmot",
                    _HINT,
                )


def _refused(layer: Any, why: str) -> job.Refused:
    return job.Refused(
        "bad_model",
        f"tfmot needs this network in tf_keras, and {type(layer).__name__} (layer {layer.name!r}) {why}",
        _HINT,
    )


def _first_line(exc: Exception) -> str:
    return next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)[:200]
