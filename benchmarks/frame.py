"""What every benchmark shares: receives measured figures, prints one table, writes ``build/bench/NAME.json``.

Peers run interleaved in the same run, block by block, so that whatever else the machine does hits all of them alike.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "build" / "bench"


@dataclass(frozen=True)
class Row:
    """One figure. ``goal`` is the most (or, with ``at_least``, the least) it may be, None when it has none; ``peer_value`` is what
    ``peer`` showed in the same run, in the same unit."""

    what: str
    value: float
    unit: str
    goal: float | None = None
    peer: str | None = None
    peer_value: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def interleave(
    peers: dict[str, Callable[[], object]], rounds: int, calls: int, warmup: int = 20
) -> dict[str, list[float]]:
    """Time each peer's call ``rounds`` x ``calls`` times, peers alternating round by round.

    Returns:
        seconds of every call by peer.
    """
    times: dict[str, list[float]] = {name: [] for name in peers}
    for call in peers.values():
        for _ in range(warmup):
            call()
    for number in range(rounds):
        # Every other round in reverse, so that none is always the one behind another.
        order = list(peers.items()) if number % 2 == 0 else list(reversed(peers.items()))
        for name, call in order:
            kept = times[name]
            for _ in range(calls):
                began = time.perf_counter()
                call()
                kept.append(time.perf_counter() - began)
    return times


def quantile(values: list[float], share: float) -> float:
    """The value that ``share`` of ``values`` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def finish(name: str, rows: list[Row]) -> None:
    """Print the table and write the file."""
    width = max(len(row.what) for row in rows)
    print(f"\n{name}: {platform.machine()}, Python {platform.python_version()}")
    print(f"{'what':{width}}  {'value':>10} {'unit':6} {'goal':>10}  met  peer")
    for row in rows:
        goal = "" if row.goal is None else f"{'>=' if row.at_least else '<='} {row.goal:g}"
        met = {None: "", True: "yes", False: "NO"}[row.met]
        peer = "" if row.peer is None else row.peer if row.peer_value is None else f"{row.peer}: {row.peer_value:.4g}"
        print(f"{row.what:{width}}  {row.value:>10.4g} {row.unit:6} {goal:>10}  {met:3}  {peer}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    entries = [
        {key: value for key, value in asdict(row).items() if key != "at_least"} | {"met": row.met} for row in rows
    ]
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(entries, indent=1) + "\n")
    print(f"written to {path}")
