"""Stage 2, compile: one step of pruning by tfmot. Receives a Keras network and training samples, hands on a sparser one, tuned to answer as before.

The classic recipe: tfmot zeros the smallest weights of each layer while the network trains, ever more by its polynomial decay (Zhu & Gupta
2017), through the first half of the step; then what is left is tuned. It is tuned as in :mod:`.prune`: towards the float network's answers, and
the labels where there are any. How far to go, and whether it went too far, is decided outside (:mod:`..pruning`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from . import job, tensorflow_source
from .keras_two import Network
from .tensorflow_converter import placed
from .training_samples import Samples, batches

# Before TensorFlow is loaded. tfmot knows Keras 2 alone; the order of sums, and so the bytes, would follow the number of cores.
os.environ |= {"TF_USE_LEGACY_KERAS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}

POWER = 3  # of the decay
UPDATES = 20  # times that weights are taken anew in a step
TEMPERATURE = 2.0  # of distillation, as in :mod:`.prune`
LABELS_SHARE = 0.5  # of the loss, where there are labels
MAX_NORM = 1.0  # of a gradient
RISE, LOWEST = (
    0.3,
    1 / 25,
)  # of one cycle of the learning rate: the share of steps in which it rises, and from which share of its highest


def prune(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``original`` and ``format`` (the float network, as :mod:`.tensorflow_converter` takes it), ``before`` (.keras file, as the last step left it;
    null at first), ``inputs`` (names), ``pruned`` (.keras file to write), ``onnx`` (the same, to write), ``from`` and ``unstructured`` (shares of the weights that are zero
    before and after), what :class:`.training_samples.Samples` asks for, ``axis`` (of the distribution that each output is; null: outputs are plain
    values), ``epochs``, ``learning_rate``, ``batch``, ``seed``.

    Result: ``weights`` that are left, not counting zeros, ``of`` how many.
    """
    progress("loading TensorFlow", 0, 1)
    import tensorflow as tf
    import tensorflow_model_optimization as tfmot
    import tf_keras

    tf_keras.utils.set_random_seed(request["seed"])
    tf.config.experimental.enable_op_determinism()
    path = placed(request["original"], request["format"])
    teacher = tensorflow_source.load_keras(path, request["format"])
    student = tensorflow_source.load_keras(
        *((request["before"], "keras") if request["before"] else (path, request["format"]))
    )
    samples = Samples(request, request["inputs"])
    steps = request["epochs"] * -(-len(samples) // request["batch"])
    plan = _plan(tfmot.sparsity.keras, request, steps)
    network = Network(student, lambda layer: tfmot.sparsity.keras.prune_low_magnitude(layer, pruning_schedule=plan))
    of = sum(int(np.prod(kernel.shape)) for kernel in network.kernels())
    if not of:
        raise job.Refused("bad_model", "this network has no layer that tfmot prunes")
    progress("pruning", 1, 1)
    _tune(teacher, network, samples, request, progress, steps)
    left = sum(int(np.count_nonzero(kernel.numpy())) for kernel in network.kernels())
    network.save(request["pruned"])
    tensorflow_source.convert({"path": request["pruned"], "format": "keras", "onnx": request["onnx"]}, progress)
    return {"weights": left, "of": of}


def _plan(tfmot: Any, request: job.Request, steps: int) -> Any:
    """tfmot's schedule over one step: from what is gone to what is to go, in the first half; where nothing more is to go, what is gone stays so."""
    before, after = request["from"], request["unstructured"]
    frequency = max(1, steps // 2 // UPDATES)
    # Weights are taken every so many steps: an end in between would be missed, and with it the last share.
    end = max(1, steps // 2 // frequency) * frequency
    if after <= before:
        return tfmot.ConstantSparsity(after, begin_step=0, end_step=end, frequency=frequency)
    return tfmot.PolynomialDecay(before, after, begin_step=0, end_step=end, power=POWER, frequency=frequency)


def _tune(
    teacher: Any, network: Network, samples: Samples, request: job.Request, progress: job.Progress, steps: int
) -> None:
    """Train the network to answer like the teacher while tfmot takes weights."""
    import tensorflow as tf
    import tensorflow_model_optimization as tfmot
    import tf_keras

    module, chance = network.module, np.random.default_rng(request["seed"])
    optimizer = tf_keras.optimizers.Adam(request["learning_rate"])
    parameters = module.trainable_variables
    pruning = tfmot.sparsity.keras.UpdatePruningStep()
    pruning.set_model(module)
    pruning.on_train_begin()
    made = _logits(_answers(teacher, samples.batch(np.arange(min(len(samples), request["batch"])))), request["axis"])

    @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator]
    def step(fed: list[Any], wanted: list[Any], labels: Any) -> None:
        with tf.GradientTape() as tape:
            answered = module(fed if len(fed) > 1 else fed[0], training=True)
            have = list(answered) if isinstance(answered, (list, tuple)) else [answered]
            loss = _loss(tf, have, wanted, request["axis"], made, labels)
        gradients, _ = tf.clip_by_global_norm(tape.gradient(loss, parameters), MAX_NORM)
        optimizer.apply_gradients(zip(gradients, parameters, strict=True))

    for number, rows in enumerate(batches(len(samples), request["batch"], request["epochs"], chance)):
        if number % 10 == 0:
            progress("tuning the network that tfmot prunes", number, steps)
        fed = samples.shown(rows, chance)
        labels = samples.labels(rows)
        optimizer.learning_rate.assign(request["learning_rate"] * cycle(number, steps))
        step([tf.constant(x) for x in fed], _answers(teacher, fed), None if labels is None else tf.constant(labels))
    pruning.on_epoch_end(0)  # the last gradient has moved weights that are gone
    progress("tuning the network that tfmot prunes", steps, steps)


def cycle(number: int, steps: int) -> float:
    """The learning rate as a share of its highest: up, then down to all but nothing, by cosines (one cycle, Smith 2018)."""
    rise = max(1.0, RISE * steps - 1)
    if number <= rise:
        low, high, share = LOWEST, 1.0, number / rise
    else:
        low, high, share = 1.0, LOWEST * 1e-4, (number - rise) / max(1.0, steps - 1 - rise)
    return high + (low - high) * (1 + math.cos(math.pi * share)) / 2


def _answers(teacher: Any, fed: list[Any]) -> list[Any]:
    import keras

    return [
        keras.ops.convert_to_tensor(value)
        for value in keras.tree.flatten(teacher(fed if len(fed) > 1 else fed[0], training=False))
    ]


def _logits(answers: list[Any], axis: int | None) -> list[bool]:
    """Of each output, whether it is logits already; what is positive and sums to 1 is a distribution."""
    return [
        axis is None or float(np.min(a)) < 0 or float(np.abs(np.sum(np.array(a), axis=axis) - 1).max()) > 1e-3
        for a in answers
    ]


def _loss(tf: Any, have: list[Any], want: list[Any], axis: int | None, made: list[bool], labels: Any) -> Any:
    """As in :mod:`.prune`: of distributions their divergence, of other values the square, in parts of their own spread."""
    total = tf.zeros(())
    for mine, theirs, is_logits in zip(have, want, made, strict=True):
        if axis is None:
            total += tf.reduce_mean((mine - theirs) ** 2) / tf.maximum(tf.math.reduce_variance(theirs), 1e-12)
            continue
        logits = _as_is if is_logits else _log(tf)
        soft, softer = (tf.nn.log_softmax(logits(values) / TEMPERATURE, axis=axis) for values in (mine, theirs))
        rows = tf.cast(tf.size(mine) / tf.shape(mine)[axis], tf.float32)
        close = tf.reduce_sum(tf.exp(softer) * (softer - soft)) * TEMPERATURE**2 / rows
        if labels is not None:
            flat = tf.reshape(logits(mine), (tf.shape(labels)[0], -1))
            right = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, flat))
            close = (1 - LABELS_SHARE) * close + LABELS_SHARE * right
        total += close
    return total


def _as_is(values: Any) -> Any:
    return values


def _log(tf: Any) -> Callable[[Any], Any]:
    return lambda values: tf.math.log(tf.maximum(values, 1e-12))


def main() -> None:
    job.serve({"prune": prune})
