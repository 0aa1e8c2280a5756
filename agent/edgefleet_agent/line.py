"""What a runner is told of its line, the model's or the agent's own, and what it notes of what happened on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from edgefleet_shared.assignment import Subject
from edgefleet_shared.lifecycle import Event
from edgefleet_shared.messages import Ended

from edgefleet_agent.effects import Effects
from edgefleet_agent.fetch import Fetcher
from edgefleet_agent.ports import Ports
from edgefleet_agent.upkeep import Upkeep


class Line(NamedTuple):
    """What makes a runner one of the board's lines: the model's, or the agent's own (:mod:`edgefleet_agent.selfupdate`).

    Args:
        subject: what its assignments are about.
        home: the folder with the board's trust, when that is not the line's own.
        effects: makes what carries its effects out.
        may_begin: whether an assignment may be taken up now.
        excused: whether the agent starts anew for another line's sake: then a start says nothing about what this one is at.
        deciding: shared by lines that share the trust; None for a lock of its own.
    """

    subject: Subject = Subject.MODEL
    home: Path | None = None
    effects: Callable[[Path, Ports, Fetcher, int, Upkeep, Callable[[Ended], None]], Effects] = Effects
    may_begin: Callable[[], bool] = lambda: True
    excused: Callable[[], bool] = lambda: False
    deciding: threading.Lock | None = None


class Happened(msgspec.Struct, frozen=True):
    """An event of the life cycle, in which transition's time, why, and which other fields of the journal change with it."""

    transition: int
    event: Event
    detail: str = ""
    changes: dict[str, Any] = {}
