"""Threads: receives work, hands on a thread that does it, or that there is no room for one; and what becomes of a process whose thread has broken."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

from edgefleet_shared.errors import EnvironmentProblem

ROOM_HINT = (
    "see its limits of processes and threads: TasksMax= of the unit, pids.max of the container, kernel.threads-max"
)


def start(thread: threading.Thread) -> None:
    """Raises EnvironmentProblem: this machine has no room for another thread."""
    try:
        thread.start()
    except RuntimeError as exc:  # as Python tells that the kernel refused
        raise EnvironmentProblem("this machine has no room for another thread", hint=ROOM_HINT) from exc


def spawn(name: str, work: Callable[[], None]) -> None:
    """Do ``work`` on a thread that does not keep the process alive.

    Raises:
        EnvironmentProblem: this machine has no room for another thread.
    """
    start(threading.Thread(target=work, name=name, daemon=True))


def end_with(broken: threading.ExceptHookArgs) -> None:
    """For :data:`threading.excepthook`: end this process, so that a whole one is started in its place. Without the thread it would look alive and,
    as a rule, hear nothing any more."""
    sys.excepthook(broken.exc_type, broken.exc_value or broken.exc_type(), broken.exc_traceback)
    os._exit(1)
