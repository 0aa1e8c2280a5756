"""Stage 2, compile: recipes. One way to make a compiled model out of a network, as data: what the search varies and the cache is keyed by."""

from __future__ import annotations

from typing import Any

import msgspec

AS_IS = "its own"  # the file came quantized, and is taken as it is
TENSORFLOW = "tensorflow"  # TensorFlow's own converter, over the Keras file that the network came as
OWN = "edgefleet"  # the quantizer of compile/children, as opposed to a toolchain's own


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """How to compile.

    ``quantizer``: ours, a toolchain's own by its name, or :data:`TENSORFLOW`, whose converter is asked in float too. ``ranges``: how activation ranges come from calibration (minmax, percentile, mse, entropy). ``weights``: ``full`` 8 bits,
    ``pairs`` 8 bits without neighbours that overflow on x86 before VNNI, ``reduced`` 7 bits. ``granularity``: weight scales per
    ``channel`` or per ``tensor``. ``activations``: ``uint8``, or ``symmetric`` (int8 without a zero point, biases in float). ``scope``: ``all`` operators that the engine has in int8, or ``weighted`` ones only (convolutions
    and matrix products). ``correct_bias``: biases take up what rounding takes from the mean; ``fit_weights``: weights are rounded so that their errors make up for
    each other, not each to the nearest. ``fused_activations``: what a weighted operator makes for an
    activation is not rounded on its way: engines that compute the two in one. ``gates_in_int8``: HardSigmoid and HardSwish in pieces that have int8 operators, Sigmoids that gate
    rounded, factors and summands for all values in scales and zero points. ``aligned_channels``: channels of zeros are added where int8
    kernels are slow at the number that there is. ``in_float``: nodes that stay in float, by name. ``pruned``: the pruned network that it starts from, by its key
    (empty: the network as it came), of whose weights the share ``sparsity`` is gone.
    """

    precision: str = "int8"
    quantizer: str = OWN
    ranges: str = "minmax"
    weights: str = "full"
    granularity: str = "channel"
    activations: str = "uint8"
    scope: str = "all"
    correct_bias: bool = True
    fit_weights: bool = True
    fused_activations: bool = False
    gates_in_int8: bool = False
    aligned_channels: bool = False
    in_float: tuple[str, ...] = ()
    pruned: str = ""
    sparsity: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """As the children take it."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found

    @property
    def exact(self) -> bool:
        """Whether what it makes answers as the float model does: nothing rounded, nothing pruned."""
        return self.precision == "fp32" and not self.pruned

    @property
    def needs_histograms(self) -> bool:
        return self.precision == "int8" and self.ranges != "minmax"

    def told(self) -> str:
        """In words, for people: what differs from the plain way."""
        if self.quantizer == AS_IS:
            return f"{self.precision}, as it came"
        parts = [self.precision]
        if self.pruned:
            parts.append(f"{self.sparsity:.0%} pruned")
        if self.precision != "int8":
            return ", ".join([*parts, *([f"by {self.quantizer}"] if self.quantizer != OWN else [])])
        parts.append(self.ranges)
        if self.quantizer != OWN:
            parts.append(f"by {self.quantizer}")
        if self.weights != "full":
            parts.append(f"weights {self.weights}")
        if self.granularity != "channel":
            parts.append(f"per {self.granularity}")
        if self.scope != "all":
            parts.append("weighted operators only")
        if not self.correct_bias:
            parts.append("biases as they were")
        if self.quantizer == OWN and not self.fit_weights:
            parts.append("weights to the nearest")
        if self.in_float:
            parts.append(f"{len(self.in_float)} nodes in float")
        return ", ".join(parts)


PLAIN_TENSORFLOW = Recipe(quantizer=TENSORFLOW, correct_bias=False)
FLOAT = Recipe(precision="fp32", correct_bias=False)
HALF = Recipe(precision="fp16", correct_bias=False)
CAME = Recipe(quantizer=AS_IS, correct_bias=False)
