"""Stage 2, compile: this machine. Hands on what its processor is and can do, which decides times and who may tell them."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path


def host() -> str:
    """What decides times on this machine: its processor's name and features."""
    kept = sorted(line for line in _cpuinfo() if line.startswith(("model name", "flags", "Features", "CPU part")))
    return hashlib.sha256("\n".join([platform.machine(), *kept]).encode()).hexdigest()[:16]


def cpu_features() -> set[str]:
    """The kernel's names of what this machine's processor can do."""
    named = (line.partition(":") for line in _cpuinfo())
    return {feature for name, _, value in named if name.strip() in ("flags", "Features") for feature in value.split()}


def _cpuinfo() -> list[str]:
    """What the kernel tells of the first processor, line by line."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        told = platform.processor()
    return told.split("\n\n")[0].splitlines()
