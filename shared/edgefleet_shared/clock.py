"""The clock as a port, so that pure code never reads one and tests turn it by hand. Times are seconds since 1970, UTC."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Wall-clock time, seconds since 1970-01-01 UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go backwards; only differences mean something."""
        ...


class SystemClock:
    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves when told to. For tests and simulation."""

    def __init__(self, now: float = 1_750_000_000.0) -> None:
        self._now = now

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


def utc(seconds: float) -> datetime:
    """``seconds`` since 1970 as an aware datetime."""
    return datetime.fromtimestamp(seconds, tz=timezone.utc)


def iso(seconds: float) -> str:
    """``seconds`` since 1970 as ``2026-11-24T03:54:43Z``."""
    return utc(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")
