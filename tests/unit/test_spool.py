"""Events that wait for the controller: kept on the disk, bounded, counted, sent once it matters, gentle to an SD card."""

from __future__ import annotations

import errno
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from chaos.spooling import FOLDER, LIMIT_BYTES, Board, Receiver, given_up_on_disk, kinds
from edgefleet_agent.event_records import RECORD, record_at
from edgefleet_agent.event_store import EventStore
from edgefleet_agent.spool import AGAIN_S, MEMORY_BYTES, READ_AGAIN_S, RESEND_LAST_S, RESEND_S, WINDOW, Spool
from edgefleet_controller.store import events
from edgefleet_controller.store.database import Database
from edgefleet_shared import atomic
from edgefleet_shared.clock import ManualClock
from edgefleet_shared.files import DISK
from edgefleet_shared.messages import Ack, Ended, Event, Health, OutcomeTold, decode
from edgefleet_shared.outcomes import Outcome
from support.disk import MemoryDisk

DAY_S, PERIOD_S, FLUSH_S = 86_400, 10, 60.0
ENDED = Ended(assignment="a1", manifest="m", outcome=Outcome.SUCCEEDED)


def disk() -> MemoryDisk:
    return MemoryDisk({"/board-in-memory": None, "/board-in-memory/state": None})


def spool_on(
    files: MemoryDisk, sent: list[bytes], clock: ManualClock, boot: str = "boot-1", limit: int = 4 << 20, told: list[str] | None = None
) -> Spool:  # fmt: skip
    made = Spool(
        FOLDER, "b1", boot, sent.append, clock, limit_bytes=limit, flush_s=FLUSH_S, files=files,
        problem=(told if told is not None else []).append,
    )  # fmt: skip
    made.tick()
    return made


def numbers(sent: list[bytes]) -> list[tuple[str, int]]:
    return [(event.boot, event.sequence) for event in (decode(content, Event) for content in sent)]


def test_what_waited_through_a_restart_goes_out_first_under_its_old_name() -> None:
    files, clock, sent = disk(), ManualClock(), list[bytes]()
    first = spool_on(files, sent, clock)
    for _ in range(3):
        first.add(Health())
    first.add(OutcomeTold(ended=ENDED))
    first.close()
    second = spool_on(files, sent, clock, boot="boot-2")
    second.add(Health())
    second.came_up()
    assert numbers(sent) == [("boot-1", 1), ("boot-1", 2), ("boot-1", 3), ("boot-1", 4), ("boot-2", 1)]


def test_a_reading_that_is_acknowledged_in_time_is_never_written() -> None:
    files, clock, sent = disk(), ManualClock(), list[bytes]()
    spool = spool_on(files, sent, clock)
    spool.came_up()
    before = len(files.log)
    for number in range(1, DAY_S // PERIOD_S + 1):
        spool.add(Health())
        spool.acknowledge(Ack("boot-1", number))
        clock.advance(PERIOD_S)
        spool.tick()
    assert files.log[before:] == []


def test_a_day_without_a_line_is_an_append_a_minute() -> None:
    files, clock = disk(), ManualClock()
    spool = spool_on(files, [], clock)
    before = len(files.log)
    for _ in range(DAY_S // PERIOD_S):
        spool.add(Health(model="toy", version="1", requests=1000, cpu_share=0.25, celsius=51.0))
        clock.advance(PERIOD_S)
        spool.tick()
    synced = [entry for entry in files.log[before:] if entry.startswith("fsync") and entry.endswith(".seg")]
    assert len(synced) <= DAY_S / FLUSH_S
    assert len(synced) >= DAY_S / FLUSH_S / 2
    assert len(spool) <= FLUSH_S / PERIOD_S, "no more than a minute of it is in memory"


def test_a_file_that_can_not_be_removed_keeps_none_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "folder.tmp").mkdir()
    store = EventStore(tmp_path, "boot-1", 1 << 20, DISK)
    store.load()
    for sequence in (1, 2):
        store.append("other", [(sequence, b"{}")])
        store.acknowledge("boot-1", sequence)
    store.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["folder.tmp"]


def test_the_bound_holds_and_health_goes_before_outcomes() -> None:
    files, receiver = disk(), Receiver()
    board = Board(files, receiver, "boot-1")
    for _ in range(30):
        board.outcome()
        board.health(13)
        board.wait()
        assert sum(len(c or b"") for p, c in files.tree().items() if p.endswith(".seg")) <= LIMIT_BYTES
    given_up = board.spool.dropped
    assert given_up == given_up_on_disk(files)
    assert set(given_up) == {"health"}
    board.exchange()
    assert kinds(receiver)["outcome"] == 30
    assert kinds(receiver)["health"] + given_up["health"] == 30 * 13


def test_when_outcomes_alone_fill_it_the_oldest_go_and_are_counted_as_what_they_are() -> None:
    files, receiver = disk(), Receiver()
    board = Board(files, receiver, "boot-1")
    for _ in range(200):
        board.outcome()
    assert set(board.spool.dropped) == {"outcome"}
    board.exchange()
    assert kinds(receiver)["outcome"] + board.spool.dropped["outcome"] == 200
    assert ("boot-1", 200) in receiver.have


def test_a_backlog_goes_out_a_window_at_a_time() -> None:
    files, clock, sent = disk(), ManualClock(), list[bytes]()
    first = spool_on(files, sent, clock)
    for _ in range(3 * WINDOW):
        first.add(Health())
    first.close()
    second = spool_on(files, sent, clock, boot="boot-2")
    second.came_up()
    assert len(sent) == WINDOW
    second.acknowledge(Ack("boot-1", 10))
    assert len(sent) == WINDOW + 10
    second.acknowledge(Ack("boot-1", 3 * WINDOW))
    assert not [name for name in files.names(FOLDER) if name.endswith(".seg")]


def test_an_old_boot_that_is_never_acknowledged_does_not_silence_the_present_one() -> None:
    files, clock, sent = disk(), ManualClock(), list[bytes]()
    first = spool_on(files, sent, clock)
    for _ in range(3 * WINDOW):
        first.add(Health())
    first.close()
    second = spool_on(files, sent, clock, boot="boot-2")
    second.came_up()
    for _ in range(2 * WINDOW):
        second.add(Health())
    assert len(sent) == 2 * WINDOW
    assert ("boot-2", WINDOW) in numbers(sent)


def test_an_acknowledgement_of_what_was_never_told_costs_no_event() -> None:
    files, clock, sent = disk(), ManualClock(), list[bytes]()
    spool = spool_on(files, sent, clock)
    spool.came_up()
    spool.acknowledge(Ack("boot-1", 1_000_000))
    spool.add(OutcomeTold(ended=ENDED))
    spool.up = False  # and what was sent is lost
    sent.clear()
    spool.came_up()
    assert numbers(sent) == [("boot-1", 1)]


def test_a_window_that_nobody_answers_is_sent_again() -> None:
    clock, sent = ManualClock(), list[bytes]()
    spool = spool_on(disk(), sent, clock)
    spool.came_up()
    spool.add(Health())
    clock.advance(31)
    spool.tick()
    assert numbers(sent) == [("boot-1", 1), ("boot-1", 1)]


def test_a_controller_that_is_away_for_a_day_finds_few_copies_and_is_asked_soon_once_it_is_back() -> None:
    clock, sent = ManualClock(), list[bytes]()
    spool = spool_on(disk(), sent, clock)
    spool.came_up()
    spool.add(Health())
    for _ in range(DAY_S // PERIOD_S):
        clock.advance(PERIOD_S)
        spool.tick()
    assert len(sent) <= DAY_S / RESEND_LAST_S + 10
    spool.acknowledge(Ack("boot-1", 1))
    spool.add(Health())
    clock.advance(RESEND_S + 1)
    spool.tick()
    assert numbers(sent)[-2:] == [("boot-1", 2), ("boot-1", 2)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_costs_memory_up_to_a_bound_says_so_and_is_used_again(number: int) -> None:
    files, clock, sent, told = disk(), ManualClock(), list[bytes](), list[str]()
    spool = spool_on(files, sent, clock, told=told)

    def refuse(count: int, operation: str, path: str) -> None:
        if operation in ("create", "write", "fsync", "rename", "mkdir"):
            raise OSError(number, os.strerror(number), path)

    files.fault = refuse
    spool.add(OutcomeTold(ended=ENDED))
    added = 4 * MEMORY_BYTES // 300
    for _ in range(added):
        spool.add(Health(model="toy", version="1", requests=1000, cpu_share=0.25, celsius=51.0))
        clock.advance(PERIOD_S)
        spool.tick()
    assert told, "it says so"
    assert told[-1].startswith("events are kept in memory only")
    lost = spool.dropped["health"]
    assert set(spool.dropped) == {"health"}
    assert 0 < added + 1 - lost <= MEMORY_BYTES / 200
    files.fault = None
    clock.advance(10)
    spool.tick()
    assert told[-1] == ""
    assert len(spool) == 0
    second = spool_on(files, sent, clock, boot="boot-2")
    assert second.dropped == {"health": lost}
    second.came_up()
    assert numbers(sent)[0] == ("boot-1", 1), "the outcome is the first that goes out"


def test_an_append_whose_fsync_failed_is_made_again_elsewhere_and_counts_once() -> None:
    files, receiver = disk(), Receiver()
    board = Board(files, receiver, "boot-1")
    board.outcome()
    failing = iter([True])

    def refuse(count: int, operation: str, path: str) -> None:
        if operation == "fsync" and path.endswith(".seg") and next(failing, False):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    files.fault = refuse
    board.outcome()
    board.clock.advance(10)
    board.spool.tick()
    board.outcome()
    other = Board(files, receiver, "boot-2")
    other.exchange()
    assert kinds(receiver) == {"outcome": 3}
    assert not [name for name in files.names(FOLDER) if name.endswith(".seg")]


def test_a_backlog_costs_little_memory() -> None:
    files, clock = disk(), ManualClock()
    first = spool_on(files, [], clock)
    for _ in range(6000):
        first.add(Health(model="toy", version="1", requests=1000, cpu_share=0.25, celsius=51.0))
    first.close()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        second = spool_on(files, [], clock, boot="boot-2")
        second.came_up()
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(second._store.boots()) == 1
    assert after - before < 600_000, f"{after - before} bytes for 6,000 events"


@pytest.mark.parametrize("limit_bytes", [LIMIT_BYTES, 1 << 20])
@pytest.mark.parametrize("seed", range(10))
def test_the_real_controller_stores_each_event_once_over_a_line_that_loses_half(
    tmp_path: Path, seed: int, limit_bytes: int
) -> None:
    rng = random.Random(seed)
    database = Database(f"sqlite:///{tmp_path / 'fleet.db'}")
    database.migrate()

    class Stored(Receiver):
        def take(self, batch: list[bytes]) -> list[Ack]:  # type: ignore[override]
            super().take(batch)
            with database.write() as session:
                acks = events.insert(session, [decode(content, Event) for content in batch], 1.0)
            return [ack for found in acks.values() for ack in found if rng.random() < 0.7]

    files, receiver = disk(), Stored()
    added: set[tuple[str, int]] = set()
    for start in range(4):
        board = Board(
            files, receiver, f"boot-{start}", loses=lambda n: n < 400 and rng.random() < 0.5, limit_bytes=limit_bytes
        )
        for _ in range(rng.randint(1, 6)):
            board.health(rng.randint(1, 13))
            board.outcome()
            if rng.random() < 0.5:
                board.wait()
        board.spool.close()
        added |= board.added
        if rng.random() < 0.4:
            board.exchange()
    last = Board(files, receiver, "last", limit_bytes=limit_bytes)
    last.exchange()
    missing = added - set(receiver.have)
    # What the controller has and its acknowledgement of which was lost may have been given up too.
    assert len(missing) <= sum(last.spool.dropped.values())
    if limit_bytes > LIMIT_BYTES:
        assert not missing
        assert not last.spool.dropped
    with database.read() as session:
        stored = {(row.boot, row.sequence) for row in events.recent(session, limit=10_000)}
    assert stored == set(receiver.have)
    database.close()


class _BadSector(MemoryDisk):
    """A disk on which one file can't be read any more once ``bad`` names it."""

    bad = ""

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        if self.bad and self.bad in str(path) and not flags & os.O_WRONLY:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().open(path, flags, mode)


def test_an_event_that_can_not_be_read_any_more_keeps_back_none_of_other_starts() -> None:
    files, clock, sent = (
        _BadSector({"/board-in-memory": None, "/board-in-memory/state": None}),
        ManualClock(),
        list[bytes](),
    )
    for boot in ("boot-1", "boot-2"):
        early = spool_on(files, sent, clock, boot=boot)
        early.add(OutcomeTold(ended=ENDED))
        early.close()
    spool = spool_on(files, sent, clock, boot="boot-3")
    spool.add(OutcomeTold(ended=ENDED))
    files.bad = "00000001-other.seg"
    spool.came_up()
    assert numbers(sent) == [("boot-2", 1), ("boot-3", 1)]
    spool.add(Health())
    assert numbers(sent)[-1] == ("boot-3", 2)
    files.bad = ""
    clock.advance(60)
    spool.tick()
    assert ("boot-1", 1) in numbers(sent)


def _bad_sector(files: _BadSector) -> None:
    files.bad = "00000001-other.seg"


def _flipped_bit(files: _BadSector) -> None:
    fd = files.open(FOLDER / "00000001-other.seg", os.O_WRONLY)
    files.pwrite(fd, b"\xff", 700)  # in the third of five events, each of some 250 bytes
    files.close(fd)


def _removed(files: _BadSector) -> None:
    files.unlink(FOLDER / "00000001-other.seg")


@pytest.mark.parametrize(("damage", "lost"), [(_bad_sector, 5), (_flipped_bit, 1), (_removed, 5)])
def test_an_event_of_this_start_that_can_not_be_read_any_more_does_not_silence_the_board(
    damage: Callable[[_BadSector], None], lost: int
) -> None:
    files = _BadSector({"/board-in-memory": None, "/board-in-memory/state": None})
    board = Board(files, Receiver(), "boot-1", limit_bytes=4 << 20)
    for _ in range(5):
        board.outcome()
    damage(files)
    board.exchange()
    for _ in range(int(READ_AGAIN_S / AGAIN_S) + 1):  # it may be the moment's: it is tried again
        board.clock.advance(AGAIN_S)
        board.spool.tick()
    board.exchange()
    board.health(3)
    board.outcome()
    board.exchange()
    assert board.spool.dropped == {"unreadable": lost}
    had = {number for _, number in board.receiver.have}
    assert len(set(range(1, 6)) - had) == lost
    assert had >= set(range(6, 10))
    assert board.receiver.floors["boot-1"] == max(had)


def _offline_for_three_appends(files: MemoryDisk) -> Board:
    board = Board(files, Receiver(), "boot-1", limit_bytes=4 << 20)
    for _ in range(3):
        board.outcome()
        board.health(4)
        board.wait()
    board.spool.close()
    return board


def _overwrite(files: MemoryDisk, name: str, content: bytes, offset: int) -> None:
    fd = files.open(FOLDER / name, os.O_WRONLY)
    files.pwrite(fd, content, offset)
    files.close(fd)


@pytest.mark.parametrize(
    ("content", "offset", "lost"),
    [
        (b"\xff", 700, 1),  # within an event's text
        (b"\xff\xff", 37, 1),  # an event's length: nobody knows where the next one begins
        (b"\xff", 20, 0),  # which boot it is of, which each event says too
        (bytes(1500), 100, 5),
    ],
)
def test_what_rots_in_the_middle_of_a_segment_is_counted_once_and_what_lies_behind_it_comes(
    content: bytes, offset: int, lost: int
) -> None:
    files = disk()
    before = _offline_for_three_appends(files)
    _overwrite(files, "00000002-health.seg", content, offset)
    for boot in ("boot-2", "boot-3"):
        board = Board(files, before.receiver, boot, limit_bytes=4 << 20)
        board.spool.came_up()
        assert board.receiver is before.receiver
        if boot == "boot-2":  # it hears what is missing, and ends before the controller does
            sent = list(board.line)
            board.line.clear()
            for ack in board.receiver.take(sent):
                board.spool.acknowledge(ack)
            board.outcome()  # what is counted comes to the disk with an append
            board.line.clear()
            board.spool.close()
    board.exchange()
    had = {number for boot, number in board.receiver.have if boot == "boot-1"}
    assert len(set(range(1, 16)) - had) == lost
    assert sum(board.spool.dropped.values()) == board.spool.dropped.get("unreadable", 0) == lost
    assert board.receiver.floors["boot-1"] == 15


def test_what_rotted_and_was_stored_by_the_controller_before_is_not_counted() -> None:
    files = disk()
    before = _offline_for_three_appends(files)
    before.spool.came_up()
    first = list(before.line)[:9]
    before.receiver.take(first)  # the line broke before its acknowledgement came
    _overwrite(files, "00000002-health.seg", b"\xff", 700)
    board = Board(files, before.receiver, "boot-2", limit_bytes=4 << 20)
    board.exchange()
    assert board.spool.dropped == {}
    assert board.receiver.floors["boot-1"] == 15


def test_an_agent_of_before_that_comes_back_reads_what_the_later_one_wrote() -> None:
    """It knows one header, at the beginning, and takes everything behind it for an event (ADR 0010)."""
    files = disk()
    _offline_for_three_appends(files)
    segment = atomic.read(FOLDER / "00000002-health.seg", files=files)
    offset, found = 0, list[tuple[int, bytes]]()
    while (whole := record_at(segment, offset)) is not None:
        found.append(whole)
        offset += RECORD.size + len(whole[1])
    assert offset == len(segment)
    (first, _), *rest = found
    assert first == 0
    assert [decode(content, Event).sequence for _, content in rest] == [sequence for sequence, _ in rest]
