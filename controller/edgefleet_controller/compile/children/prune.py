"""Stage 2, compile: one step of pruning. Receives a float network and training samples, hands on a smaller one, tuned to answer as before.

Channels go by torch-pruning, whole groups of layers at a time and all layers together, the ones of least magnitude first; single weights by
magnitude. Then the network is tuned: it is shown augmented samples and follows what the float network answers to them (Hinton et al. 2015),
and the labels where there are any. How far to go, and whether it went too far, is decided outside (:mod:`..pruning`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch_pruning
from torch.nn import functional

from . import job
from .torch_network import Misfit, Network
from .training_samples import Samples, batches

TEMPERATURE = 2.0  # of distillation; softer answers say more than the largest one
LABELS_SHARE = 0.5  # of the loss, where there are labels
FINEST = 200  # parts in which channels are taken, until few enough weights are left
MOST_OF_A_LAYER = 0.9  # no layer loses more of its channels than this
WIDE, NARROW = 8, 4  # channels stay a multiple of: kernels of networks with layers of 128 and more take them by eight
MAX_NORM = 1.0  # of a gradient


def prune(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``teacher`` (the float network), ``network`` (as the last step left it), ``pruned`` (file to write), what
    :class:`.training_samples.Samples` asks for, ``axis`` (of the distribution that each output is; null: outputs are plain values),
    ``structured`` (share of the weights whose channels go; null: no more of them), ``unstructured`` (share of those left to be zero), ``epochs``,
    ``learning_rate``, ``batch``, ``seed``.

    Result: ``weights`` that are left, not counting zeros, ``of`` how many.
    """
    torch.manual_seed(request["seed"])
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # the order of sums, and so the bytes, would follow the number of cores
    teacher, student = Network(request["teacher"]), Network(request["network"])
    samples = Samples(request, student.inputs)
    of = teacher.weights()
    progress("pruning", 0, 1)
    example = [torch.from_numpy(x) for x in samples.batch(np.arange(min(2, request["batch"])))]
    _look(teacher, example)
    if request["structured"]:
        _take_channels(student, round(of * (1 - request["structured"])), example)
        if student.size() == teacher.size():
            raise job.Refused(
                "bad_model",
                f"no channels of this network can be taken: all layers' reach outputs or what counts them ({student.counting() or 'none'})",
                "prune.unstructured takes single weights",
            )
    masks = _take_weights(student, request["unstructured"]) if request["unstructured"] else []
    progress("pruning", 1, 1)
    _tune(teacher, student, samples, masks, request, progress)
    student.save(request["pruned"])
    return {"weights": student.weights(), "of": of}


def _look(network: Network, example: list[Any]) -> None:
    """See that the network takes as many samples at once as it will be shown.

    Raises:
        job.Refused: it does not.
    """
    try:
        network.run(example)
    except Misfit as exc:
        one = "it takes one sample at a time: " if len(example[0]) > 1 else ""
        raise job.Refused(
            "bad_model",
            f"this network can't be tuned, so not pruned: {one}{exc}",
            "prune.batch: 1 tunes it by one sample at a time" if one else "leave spec.prune away",
        ) from exc


def _take_channels(network: Network, keep: int, example: list[Any]) -> None:
    """Take channels until at most ``keep`` weights are left."""
    try:
        fits = _without_channels(network, keep, example)
    except (Misfit, RuntimeError, ValueError, IndexError) as exc:  # torch-pruning's own, of shapes that don't meet
        raise job.Refused(
            "bad_model",
            f"channels of this network can't be taken: {str(exc).splitlines()[0]}",
            "prune.unstructured takes single weights",
        ) from exc
    if not fits:
        raise job.Refused("bad_model", "channels of this network can't be taken: its outputs would change their shapes")


def _without_channels(network: Network, keep: int, example: list[Any]) -> bool:
    """Take them; whether the outputs keep their shapes."""
    layers, module = network.pruned_layers(), network.module
    widest = max(layer.weight.shape[0] for layer in layers)
    module.eval()
    shapes = [tuple(output.shape) for output in network.run(example)]
    pruner = torch_pruning.pruner.MetaPruner(
        module, tuple(example), importance=torch_pruning.importance.GroupMagnitudeImportance(p=2), global_pruning=False,
        pruning_ratio=MOST_OF_A_LAYER, max_pruning_ratio=MOST_OF_A_LAYER, iterative_steps=FINEST, ignored_layers=network.fixed_layers(),
        round_to=WIDE if widest >= 128 else NARROW,
    )  # fmt: skip
    left = sum(layer.weight.numel() for layer in layers)
    for _ in range(FINEST):
        if left <= keep:
            break
        # One group after the other: where layers are narrow, all of them at once lose a multiple of what was asked.
        for group in pruner.step(interactive=True):
            group.prune()
            left = sum(layer.weight.numel() for layer in layers)
            if left <= keep:
                break
    return [tuple(output.shape) for output in network.run(example)] == shapes


def _take_weights(network: Network, share: float) -> list[tuple[Any, Any]]:
    """Zero this share of the weights, the smallest. Returns (weight, mask) pairs, to hold them at zero."""
    weights = [layer.weight for layer in network.pruned_layers()]
    # Held against their layer's spread: a layer of small weights is not less needed than one of large.
    scaled = [w.detach().abs() / w.detach().std().clamp_min(1e-12) for w in weights]
    every = torch.cat([s.flatten() for s in scaled])
    threshold = torch.kthvalue(every, max(1, round(len(every) * share))).values
    masks = [(weight, (s > threshold).float()) for weight, s in zip(weights, scaled, strict=True)]
    with torch.no_grad():
        for weight, mask in masks:
            weight.mul_(mask)
    return masks


def _tune(
    teacher: Network,
    student: Network,
    samples: Samples,
    masks: list[tuple[Any, Any]],
    request: job.Request,
    progress: job.Progress,
) -> None:
    """Train the pruned network to answer like the teacher."""
    teacher.module.eval().requires_grad_(False)
    student.module.eval()  # normalisation keeps the statistics that it was trained with
    parameters = [p for p in student.module.parameters() if p.requires_grad]
    per_epoch = -(-len(samples) // request["batch"])
    steps = request["epochs"] * per_epoch
    optimizer = torch.optim.Adam(parameters, lr=request["learning_rate"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, request["learning_rate"], total_steps=steps)
    chance = np.random.default_rng(request["seed"])
    made = [_log if softmax else _as_is for softmax in teacher.softmax]
    for step, rows in enumerate(batches(len(samples), request["batch"], request["epochs"], chance)):
        if step % 10 == 0:
            progress("tuning the pruned network", step, steps)
        batch = [torch.from_numpy(x) for x in samples.shown(rows, chance)]
        with torch.no_grad():
            wanted = _called(teacher, batch)
        loss = _loss(_called(student, batch), wanted, request["axis"], made, _tensor(samples.labels(rows)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for weight, mask in masks:
                weight.mul_(mask)
    progress("tuning the pruned network", steps, steps)


def _tensor(labels: Any) -> Any:
    return None if labels is None else torch.from_numpy(labels)


def _called(network: Network, batch: list[Any]) -> list[Any]:
    found = network.module(*batch)
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _loss(have: list[Any], want: list[Any], axis: int | None, made: list[Any], labels: Any) -> Any:
    """Distance of the answers: of distributions their divergence, of other values the square, in parts of their own spread."""
    total = torch.zeros(())
    for mine, theirs, logits in zip(have, want, made, strict=True):
        if axis is None:
            total = total + functional.mse_loss(mine, theirs) / theirs.var().clamp_min(1e-12)
            continue
        soft, softer = (functional.log_softmax(logits(values) / TEMPERATURE, dim=axis) for values in (mine, theirs))
        rows = mine.numel() / mine.shape[axis]
        close = functional.kl_div(soft, softer, log_target=True, reduction="sum") * TEMPERATURE**2 / rows
        if labels is not None:
            right = functional.cross_entropy(logits(mine).reshape(len(labels), -1), labels)
            close = (1 - LABELS_SHARE) * close + LABELS_SHARE * right
        total = total + close
    return total


def _as_is(values: Any) -> Any:
    return values


def _log(values: Any) -> Any:
    return values.clamp_min(1e-12).log()


def main() -> None:
    job.serve({"prune": prune})
