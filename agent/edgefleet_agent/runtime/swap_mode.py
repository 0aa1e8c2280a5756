"""How to swap: receives a candidate's config and what the caller wants, hands on blue-green or in-place, and why.

Blue-green needs memory for both versions at once. Who decides: the caller, else the device class, else what is free just now.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edgefleet_shared.artifact import ModelConfig

from edgefleet_agent.runtime.control import SwapMode

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


def available_memory_bytes() -> int:
    """Memory that a new process could use: the machine's, or what the control group leaves when that is less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2]
        folder = Path("/sys/fs/cgroup") / group.lstrip("/")
        limit, used = (folder / "memory.max").read_text().strip(), (folder / "memory.current").read_text()
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
