"""The real agent without a line, killed with -9 and started again: the controller gets every event that was stored, each once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from chaos.spooling import Receiver
from edgefleet_agent import journal, settings
from edgefleet_agent.event_store import EventStore
from edgefleet_shared.files import DISK
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import Ack, Event, OutcomeTold, decode, encode
from edgefleet_shared.outcomes import Outcome
from support import artifacts
from support.broker import until
from support.controller import Board, Controller


class StoringController(Controller):
    """Acknowledges as the real one does: up to where it has everything."""

    def __init__(self, folder: Path) -> None:
        self.receiver = Receiver()
        super().__init__(folder)

    def events(self, events: Sequence[Event]) -> list[tuple[str, Ack]]:
        super().events(events)
        return [(event.device, ack) for event in events for ack in self.receiver.take([encode(event)])]


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[StoringController]:
    made = StoringController(tmp_path / "controller")
    yield made
    made.stop()


def waiting(state: Path) -> set[tuple[str, int]]:
    """What an agent's store holds. A copy is looked at: to load a store is to cut off what a live agent is just appending."""
    copy = state.parent / "looked at"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for path in list((state / "spool").iterdir()):
        with suppress(FileNotFoundError):  # collected meanwhile
            (copy / path.name).write_bytes(path.read_bytes())
    store = EventStore(copy, "the test", 1 << 30, DISK)
    store.load()
    found = set()
    for boot in store.boots():
        sequence = 0
        while (sequence := store.next_after(boot, sequence) or 0) != 0:
            found.add((boot, sequence))
    return found


def test_every_event_that_was_stored_comes_once_after_kills_without_a_line(
    controller: StoringController, tmp_path: Path
) -> None:
    state = tmp_path / "b1"
    board = Board(controller, "b1", state)
    settings.write(state, msgspec.structs.replace(settings.read(state), spool_flush_s=1.0))
    made = artifacts.make_artifact(controller.layout, version="1", device_class=controller.device_class)
    controller.release(made, "toy", "1")
    board.start()
    try:
        assignment = controller.assign("b1", made, "1", soak_s=8)
        until(lambda: "b1" in controller.reports and controller.reports["b1"].state is State.SOAKING, "it soaks", 60)
        controller.broker.broker.stop()

        def ended() -> bool:
            now = journal.read(state)
            return now.ended is not None and now.ended.assignment == assignment and now.result is not None

        until(ended, "the outcome is signed while there is no line", 60)
        until(lambda: len(list((state / "spool").glob("*-health.seg"))) > 0, "health was written")
        board.kill_agent()
        stored = waiting(state)
        assert len(stored) > 3
        board.start_agent()
        until(lambda: len({boot for boot, _ in waiting(state)}) > 1, "the second start writes too", 60)
        board.kill_agent()
        stored |= waiting(state)
        board.start_agent()
        controller.broker.broker.start()
        until(lambda: stored <= set(controller.receiver.have), "everything that was stored has come", 90)
        until(lambda: not list((state / "spool").glob("*.seg")), "nothing waits any more", 60)
        outcomes = [
            body.ended.outcome
            for content in controller.receiver.have.values()
            if isinstance(body := decode(content, Event).body, OutcomeTold)
        ]
        assert outcomes == [Outcome.SUCCEEDED]
    finally:
        board.stop()
