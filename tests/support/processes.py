"""Whether processes that a test did not start itself still run: grandchildren, the children of something that was killed."""

from __future__ import annotations

import time
from pathlib import Path


def alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and that nobody reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_ends(pid: int, what: str, *, within_s: float = 10.0) -> None:
    """Wait for a process to end: a signal that was sent is not yet a process that has died of it."""
    deadline = time.monotonic() + within_s
    while alive(pid):
        assert time.monotonic() < deadline, f"{what} runs on"
        time.sleep(0.02)
