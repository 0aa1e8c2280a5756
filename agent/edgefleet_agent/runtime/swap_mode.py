"""How to swap: receives a candidate's config and what the caller wants, hands on blue-green or in-place, and why.

Blue-green needs memory for both versions at once. Who decides: the caller, else the device class, else what is free just now.
"""

from __future__ import annotations

from typing import Literal

from edgefleet_shared.artifact import ModelConfig

from edgefleet_agent.runtime.control import SwapMode
from edgefleet_agent.runtime.memory import available_memory_bytes

MEMORY_MARGIN = 1.1  # blue-green needs the new model's peak and a little
MEMORY_RESERVE_BYTES = 32 * 1024 * 1024


def choose(
    config: ModelConfig, mode: SwapMode, something_serves: bool
) -> tuple[Literal["blue-green", "in-place"], str]:
    """The mode for a candidate, and why, for people."""
    if not something_serves:
        return "blue-green", "nothing serves yet"
    for wanted, by in ((mode, "the caller"), (config.swap, "the device class")):
        if wanted == "in-place":
            return "in-place", f"{by} wants it"
        if wanted == "blue-green":
            return "blue-green", f"{by} wants it"
    needed = int(config.contract.peak_memory_bytes * MEMORY_MARGIN) + MEMORY_RESERVE_BYTES
    free = available_memory_bytes()
    if free >= needed:
        return "blue-green", f"{free} bytes are free, {needed} are needed"
    return "in-place", f"only {free} bytes are free, {needed} are needed"
