"""Stage 7, accept: receives a process, hands on for how long its threads waited for a core: what a busy board costs it.

A thread that waits for an accelerator sleeps and is on no run queue, so that this tells a slow model from a busy board where the share of CPU
time can't. Source: kernel ``Documentation/scheduler/sched-stats.rst`` (``/proc/<pid>/schedstat``).
"""

from __future__ import annotations

from pathlib import Path


def waits_s(process: str = "self", proc: Path = Path("/proc")) -> dict[str, float]:
    """For how long each thread of a process has waited for a core so far; empty where the kernel does not tell."""
    waits, ran = dict[str, float](), 0
    try:
        for task in (proc / process / "task").iterdir():
            try:
                ran_ns, waited_ns, *_ = (int(figure) for figure in (task / "schedstat").read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            waits[task.name] = waited_ns / 1e9
            ran += ran_ns
    except (OSError, ValueError):
        return {}
    return waits if ran else {}  # a kernel that counts none of it shows zeros


def longest_share(before: dict[str, float], after: dict[str, float], seconds: float) -> float | None:
    """The share of some time that the thread which waited most has waited, between two looks; None where nobody knows."""
    if not after or seconds <= 0:
        return None
    return min(1.0, max(waited - before.get(thread, 0.0) for thread, waited in after.items()) / seconds)
