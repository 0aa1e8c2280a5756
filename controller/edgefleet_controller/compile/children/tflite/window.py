"""Stage 2, compile: windows that slide over pictures, for convolutions and pools. Receives a node, hands on its window and padding.

TFLite pads in two ways only: VALID (not at all) and SAME (just enough, the odd one after). Any other padding is an operator.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from .layout import Shape, Value
from .node import Node
from .writer import Writer

SAME, VALID = int(schema.Padding.SAME), int(schema.Padding.VALID)

MOST = 2**15  # pixels; more than any picture has, and TFLite counts with 32 bits

Pair = tuple[int, int]


class Window(NamedTuple):
    """Sizes in height, width."""

    kernel: Pair
    strides: Pair
    dilations: Pair
    pads: tuple[int, int, int, int]  # top, left, bottom, right

    def span(self, i: int) -> int:
        """How many elements it covers, holes included."""
        return (self.kernel[i] - 1) * self.dilations[i] + 1

    def unpadded(self, size: Shape) -> Shape:
        """What comes out of an input that is padded already."""
        return tuple((size[i] - self.span(i)) // self.strides[i] + 1 for i in (0, 1))

    def same_size(self, size: Shape) -> Shape:
        """What comes out of TFLite's SAME."""
        return tuple(-(-size[i] // self.strides[i]) for i in (0, 1))

    def same_pads(self, size: Shape) -> tuple[int, int, int, int]:
        """TFLite's SAME."""
        totals = [max((self.same_size(size)[i] - 1) * self.strides[i] + self.span(i) - size[i], 0) for i in (0, 1)]
        top, left = (total // 2 for total in totals)
        return top, left, totals[0] - top, totals[1] - left


def window_of(node: Node, kernel: Shape, size: Shape, *, moved: bool = True) -> Window:
    """The window of a node over a picture of that size; one of one dimension gets a height of 1.

    Args:
        moved: whether ``auto_pad`` becomes pads; for a transposed convolution it means something else.
    """
    rank = len(node.shape) - 2
    more = 2 - rank
    strides = (1,) * more + tuple(node.get("strides", (1,) * rank))
    dilations = (1,) * more + tuple(node.get("dilations", (1,) * rank))
    given = tuple(node.get("pads", (0,) * (2 * rank)))
    pads = given if rank == 2 else (0, given[0], 0, given[1])
    auto = node.get("auto_pad", "NOTSET")
    if (
        min(*strides, *dilations, *kernel) < 1
        or min(pads) < 0
        or max(*strides, *dilations, *kernel, *pads) > MOST
        or tuple(node.get("kernel_shape", kernel[-rank:])) != tuple(kernel[-rank:])
    ):
        raise node.refused(
            f"with kernel {list(kernel)}, strides {list(strides)}, dilations {list(dilations)}, pads {list(pads)}"
        )
    window = Window(tuple(kernel), strides, dilations, pads)  # type: ignore[arg-type]
    if auto not in {"NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"}:
        raise node.refused(f"with auto_pad {auto!r}")
    if not moved or auto == "NOTSET":
        return window
    top, left, bottom, right = window.same_pads(size)
    ways = {"SAME_UPPER": (top, left, bottom, right), "SAME_LOWER": (bottom, right, top, left), "VALID": (0, 0, 0, 0)}
    return window._replace(pads=ways[auto])


def padded(writer: Writer, node: Node, x: Value, window: Window) -> tuple[Value, int]:
    """(input, TFLite's padding) for a window over zeros; pads that TFLite can't express become an operator."""
    size = (x.shape[2], x.shape[3])
    if not any(window.pads):
        return x, VALID
    if window.pads == window.same_pads(size):
        return x, SAME
    return with_border(writer, f"{node.output}/padded", x, window.pads, "PAD"), VALID


def with_border(writer: Writer, name: str, x: Value, pads: tuple[int, int, int, int], op: str) -> Value:
    """A picture with a border: of zeros (``PAD``), of the lowest number (``PADV2``), or of its mirrored edge (``MIRROR_PAD``)."""
    top, left, bottom, right = pads
    width = writer.constant(f"{name}/pads", np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32))
    shape = (*x.shape[:2], x.shape[2] + top + bottom, x.shape[3] + left + right)
    if op == "PADV2":
        lowest = writer.number(f"{name}/fill", float(np.finfo(np.float32).min))
        return writer.emit(name, op, [x, width, lowest], shape, "PadV2Options", order=x.order)
    mirrored = {"mode": int(schema.MirrorPadMode.SYMMETRIC)} if op == "MIRROR_PAD" else {}
    options = "MirrorPadOptions" if mirrored else "PadOptions"
    return writer.emit(name, op, [x, width], shape, options, order=x.order, **mirrored)
