"""A worker's loop: what ends it, and that nothing ends a part of it in silence."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from edgefleet_shared.work import CompileTask
from edgefleet_shared.work_loop import run_until_signalled

TASK = CompileTask(
    lease="l", lease_s=60.0, job="j", version="v", device_class="c", ship_despite_quality=False, builder=False, blobs=()
)


class Client:
    """A controller that has one task, and then nothing to do."""

    def __init__(self) -> None:
        self.tasks = [TASK]

    def claim(self) -> Any:
        return self.tasks.pop() if self.tasks else None

    def progress(self, *_: Any) -> bool:
        return True

    def renewal_is_due(self, now: float) -> bool:
        return False


@pytest.fixture
def handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_fault_of_our_own_in_one_task_ends_the_worker_so_that_its_supervisor_starts_it_again() -> None:
    """Else it goes on as a process that is there, renews its certificate, and takes no work any more."""
    told = threading.Timer(20.0, os.kill, (os.getpid(), signal.SIGTERM))
    told.start()
    ended: list[str] = []

    def carry_out(*_: Any) -> None:
        raise ZeroDivisionError("a fault of our own")

    with pytest.raises(ZeroDivisionError):
        run_until_signalled(Client(), carry_out, at_once=2, end=lambda: ended.append("end"), renew=str)  # type: ignore[arg-type]
    assert told.is_alive(), "nobody had to tell it"
    told.cancel()
    assert ended == ["end"]
