"""What the kernel tells as files: receives a path, hands on its value, or that there is none. A driver may take a file away while one looks."""

from __future__ import annotations

import math
from pathlib import Path


def found(folder: Path, pattern: str) -> list[Path]:
    """What matches below a folder, in order; nothing where it can't be opened now."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def text(path: Path) -> str:
    """A file's text without the space around it, empty where it can't be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def number(path: Path) -> float | None:
    """A file's number, None where it can't be read or is none."""
    try:
        value = float(path.read_text())
    except (OSError, ValueError):
        return None
    return value if math.isfinite(value) else None
