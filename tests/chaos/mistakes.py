"""Planted mistakes: what the agent or its disk would do without one of the rules, each to be caught by an exploration."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
from edgefleet_agent import (
    admission,
    effects,
    enroll,
    event_records,
    event_store,
    journal,
    plans,
    runner,
    slots,
    spool,
    swap,
    upkeep,
    verify,
)  # fmt: skip
from edgefleet_agent import settings as board_settings
from edgefleet_shared import artifact, atomic
from edgefleet_shared.lifecycle import Effect, Event, State
from edgefleet_shared.outcomes import Outcome
from support.disk import MemoryDisk


class NoFileSync(MemoryDisk):
    """fsync of a file does nothing."""

    def fsync(self, fd: int) -> None:
        if self._open[fd][0].names is not None:
            super().fsync(fd)


class NoFolderSync(MemoryDisk):
    """fsync of a folder does nothing."""

    def fsync(self, fd: int) -> None:
        if self._open[fd][0].names is None:
            super().fsync(fd)


class NoBlobFolderSync(MemoryDisk):
    """fsync of the folder of blobs does nothing."""

    def fsync(self, fd: int) -> None:
        if not self._open[fd][1].endswith("sha256"):
            super().fsync(fd)


def write_in_place(path: Path, content: bytes, mode: int = 0o644, *, files: Any) -> None:
    atomic._fill(path, content, mode, files)
    atomic.sync_folder(path.parent, files=files)


def write_after_removing(path: Path, content: bytes, mode: int = 0o644, *, files: Any) -> None:
    with suppress(FileNotFoundError):
        files.unlink(path)
    atomic._fill(path, content, mode, files)
    atomic.sync_folder(path.parent, files=files)


def write_then_sync_by_name(path: Path, content: bytes, mode: int = 0o644, *, files: Any) -> None:
    """Rename first, sync afterwards."""
    temporary = path.with_name(f".{path.name}.tmp")
    fd = files.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    files.pwrite(fd, memoryview(content), 0)
    files.replace(temporary, path)
    atomic.sync_folder(path.parent, files=files)
    files.fsync(fd)
    files.close(fd)


def adopt_without_sync(temporary: Path, path: Path, *, files: Any) -> None:
    files.replace(temporary, path)
    atomic.sync_folder(path.parent, files=files)


def adopt_without_folder_sync(temporary: Path, path: Path, *, files: Any) -> None:
    fd = files.open(temporary, os.O_RDONLY)
    files.fsync(fd)
    files.close(fd)
    files.replace(temporary, path)


_swap, _carry_out, _write_slots, _collect = swap.swap, effects.Effects.carry_out, slots.write, slots.collect_garbage


def collect_at_the_flip(state: Path, ports: Any, assignment: Any, report: Any, stop: Any) -> Any:
    """The old artifact goes before the new one is committed."""
    done = _swap(state, ports, assignment, report, stop)
    now = slots.read(state, files=ports.files)
    _collect(state, slots.Slots(active=now.active), files=ports.files)
    return done


def collect_before_the_slots_say_so(state: Path, ports: Any, failed: str, stop: Any) -> Any:
    """A return that removes the failed artifact's blobs while the slots still name it."""
    now = slots.read(state, files=ports.files)
    if now.active is not None and now.active.manifest == failed and now.previous is not None:
        _collect(state, now.returned(), files=ports.files)
    return _go_back(state, ports, failed, stop)


_go_back = swap.go_back


def flip_before_accepting(self: effects.Effects, effect: Effect, journal_: journal.Journal) -> Any:
    if effect is Effect.ACCEPT:
        files = self._ports.files
        now = slots.read(self._state, files=files)
        if now.candidate is not None:
            slots.write(self._state, now.flipped(), files=files)
    return _carry_out(self, effect, journal_)


def flip_before_fetching(self: effects.Effects, effect: Effect, journal_: journal.Journal) -> Any:
    done = _carry_out(self, effect, journal_)
    if effect is Effect.FETCH:
        files = self._ports.files
        now = slots.read(self._state, files=files)
        if now.candidate is not None:
            slots.write(self._state, now.flipped(), files=files)
    return done


def go_back_from_what_is_active(self: effects.Effects, effect: Effect, journal_: journal.Journal) -> Any:
    """What failed is looked up, not remembered: a second try takes the one that was returned to for it."""
    if effect is Effect.RETURN and journal_.life.outcome is Outcome.LATE_REGRESSION:

        def job(stop: Any) -> effects.Result:
            active = slots.read(self._state, files=self._ports.files).active
            return effects.Result(*swap.go_back(self._state, self._ports, active.manifest if active else "", stop))

        return job
    return _carry_out(self, effect, journal_)


def commit_collects_first(state: Path, ports: Any) -> Any:
    """Everything but the new artifact is collected, then the slots are written."""
    now = slots.read(state, files=ports.files)
    _collect(state, slots.Slots(active=now.active), files=ports.files)
    return _commit(state, ports)


_commit = swap.commit


@contextmanager
def floors_written_late() -> Iterator[None]:
    """The floors follow when the slots are written next, after work for the assignment has begun."""
    late: list[tuple[Any, ...]] = []
    write_floors = verify.write_floors

    def later(state: Path, floors: Any, *, files: Any) -> None:
        late[:] = [(state, floors, files)]

    def write_slots(state: Path, now: Any, *, files: Any) -> None:
        _write_slots(state, now, files=files)
        for where, floors, disk in late:
            if disk is files:
                write_floors(where, floors, files=disk)
        late.clear()

    with patch.object(verify, "write_floors", later), patch.object(slots, "write", write_slots):
        yield


def one_copy_of_the_floors_in_place(state: Path, floors: Any, *, files: Any) -> None:
    write_in_place(state / "trust" / "floors-a.json", msgspec.json.encode(floors), files=files)


def floors_only_when_they_differ(state: Path, floors: Any, *, files: Any) -> None:
    """What an earlier start renamed, perhaps without having synced it, is taken for durable."""
    if verify.read_floors(state, files=files) != floors:
        for name in verify.FLOOR_FILES:
            atomic.write(state / "trust" / name, msgspec.json.encode(floors), files=files)


def keep_enrolment_backwards(
    state: Path, enrolled: Any, ca: str, *, threads: int, health_period_s: float, files: Any
) -> None:
    """The file that says that the rest is there comes first."""
    board_settings.write(
        state,
        board_settings.Settings(
            device=enrolled.device, device_class=enrolled.device_class, site="", broker_host="", broker_port=1
        ),
        files=files,
    )
    atomic.write(state / "identity" / "agent.pem", enrolled.certificate.encode(), files=files)
    atomic.write(state / "identity" / "ca.pem", ca.encode(), files=files)
    atomic.write(state / "trust" / "root.json", enrolled.root.encode(), files=files)


def take_up_only_after_an_event(self: runner.Runner, now: float) -> None:
    """A pending assignment is looked at when something has happened, not at the start."""
    while self._events:
        event = self._events.popleft()
        if event.transition == self._transition:
            self._feed(event)
        if self._keeper.now.life.state is State.IDLE and not self._events and event.event.value != "restarted":
            self._take_up()


def act_then_persist(self: journal.Keeper, changed: journal.Journal) -> None:
    """The journal on the disk is one step behind what is being done."""
    journal.write(self._state, self.now, files=self._files)
    self.now = changed


def no_sync_of_the_layout(self: artifact.Layout) -> None:
    """Blobs that an interrupted start had named are taken for durable."""


@contextmanager
def decide_by_old_metadata() -> Iterator[None]:
    """An assignment is held against whatever metadata lay on the disk while the board was away."""
    with patch.object(admission.Admissions, "connected", lambda self: setattr(self, "_fresh", True)):
        yield


def adopt_a_plan_that_is_not_safe(self: plans.Incoming, key: str) -> plans.Plan:
    """The plan has its name and its record before its bytes are safe."""
    files, digest = self._layout.files, "sha256:" + self._state.hexdigest()
    files.replace(self._temporary, self._layout.path(digest))
    return plans.Plan(self._artifact, key, digest, self.size)


_forget_others = plans.forget_others


def forget_all_plans_but_one(layout: artifact.Layout, artifacts: Any) -> set[str]:
    """The plan of what one can return to goes with the commit."""
    active = slots.read(layout.root.parent, files=layout.files).active
    return _forget_others(layout, {active.manifest} if active else set())


def keep_all_plans(layout: artifact.Layout, artifacts: Any) -> set[str]:
    return {plan.digest for plan in plans.read(layout).values()}


def build_at_the_first_inference(self: upkeep.Upkeep, manifest: str, stop: Any, during: State = State.BUILDING) -> Any:
    return Event.BUILT, "later"


_take_out, _find, _send = event_store.EventStore._take_out, event_store.EventStore._find, spool.Spool._send


def append_without_sync(path: Path, piece: bytes, offset: int, *, files: Any) -> None:
    atomic.write_piece(path, piece, offset, files=files)
    if offset == 0:
        atomic.sync_folder(path.parent, files=files)


def append_without_folder_sync(path: Path, piece: bytes, offset: int, *, files: Any) -> None:
    fd = files.open(path, os.O_WRONLY | os.O_CREAT)
    files.pwrite(fd, memoryview(piece), offset)
    files.fsync(fd)
    files.close(fd)


def record_without_checksum(content: bytes, offset: int) -> tuple[int, bytes] | None:
    """Whatever has a length is taken for a record."""
    header = event_records.RECORD
    if offset + header.size > len(content):
        return None
    _, length, sequence = header.unpack_from(content, offset)
    end = offset + header.size + length
    return (sequence, content[offset + header.size : end]) if end <= len(content) else None


def remove_before_counting(self: event_store.EventStore, segment: event_store.Segment) -> None:
    kinds = {segment.lane: len(segment.sequences)}
    _take_out(self, segment)
    self.collect()
    self._write_given_up(event_store.GivenUp(kinds=event_store._sum(self.dropped, kinds), segments=(segment.number,)))


def count_without_naming(self: event_store.EventStore, given_up: event_store.GivenUp) -> None:
    """What was given up is counted, and which segment it was in is not said."""
    atomic.write(
        self._folder / "dropped.json", msgspec.json.encode(event_store.GivenUp(kinds=given_up.kinds)), files=self._files
    )
    self._given_up, self._counted = given_up, True


def remove_what_was_sent(self: spool.Spool) -> None:
    """What went out is taken for what came in."""
    _send(self)
    for boot, sequence in self._in_flight:
        self._store.acknowledge(boot, sequence)


def oldest_first_whatever_it_is(self: event_store.EventStore, lane: event_store.Lane, needed_bytes: int) -> None:
    while (
        self._segments
        and sum(s.disk_bytes for s in self._segments) + needed_bytes > self._limit - event_store.BLOCK_BYTES
    ):
        self._give_up(min(self._segments, key=lambda s: s.number))


@dataclass(frozen=True)
class Mistake:
    """A mistake, and the story whose exploration catches it; ``kills`` when it takes a killed agent before the cut."""

    name: str
    story: str
    plant: Callable[[], Any] | None = None
    make_disk: type[MemoryDisk] = MemoryDisk
    kills: bool = False


def _patched(owner: Any, name: str, replacement: Any) -> Callable[[], Any]:
    return lambda: patch.object(owner, name, replacement)


INSTALL, BACK, LATE = "install over two, the first is collected", "rollback", "late regression"
BUILD, UPGRADE = (
    "install that is built over two, the first is collected with its plan",
    "engine upgraded under what serves",
)

MISTAKES = (
    Mistake("no fsync of files", INSTALL, make_disk=NoFileSync),
    Mistake("no fsync of folders", INSTALL, make_disk=NoFolderSync),
    Mistake("no fsync of the blobs' folder", INSTALL, make_disk=NoBlobFolderSync),
    Mistake("in-place write", INSTALL, _patched(atomic, "write", write_in_place)),
    Mistake("remove, then write", INSTALL, _patched(atomic, "write", write_after_removing)),
    Mistake("rename before fsync", INSTALL, _patched(atomic, "write", write_then_sync_by_name)),
    Mistake("blob named before its bytes are safe", INSTALL, _patched(atomic, "adopt", adopt_without_sync)),
    Mistake("collect before commit", BACK, _patched(swap, "swap", collect_at_the_flip)),
    Mistake("collect at commit what is kept to return to", INSTALL, _patched(swap, "commit", commit_collects_first)),
    Mistake("collect before the slots say so", BACK, _patched(swap, "go_back", collect_before_the_slots_say_so)),
    Mistake("flip before accepting", "install that is refused", _patched(effects.Effects, "carry_out", flip_before_accepting)),
    Mistake("flip before fetching", INSTALL, _patched(effects.Effects, "carry_out", flip_before_fetching)),
    Mistake("floors written late", INSTALL, floors_written_late),
    Mistake("floors in one copy, in place", "superseded while fetching", _patched(verify, "write_floors", one_copy_of_the_floors_in_place)),
    Mistake("act, then persist", LATE, _patched(journal.Keeper, "replace", act_then_persist)),
    Mistake("pending assignment forgotten at the start", INSTALL, _patched(runner.Runner, "_work_off", take_up_only_after_an_event)),
    Mistake("what failed is looked up, not remembered", LATE, _patched(effects.Effects, "carry_out", go_back_from_what_is_active)),
    Mistake("decide by old metadata", INSTALL, decide_by_old_metadata),
    Mistake("floors of a killed start taken for durable", INSTALL, _patched(verify, "write_floors", floors_only_when_they_differ), kills=True),
    Mistake("plan named before its bytes are safe", BUILD, _patched(plans.Incoming, "adopt", adopt_a_plan_that_is_not_safe)),
    Mistake("plan of what one can return to is collected", BUILD, _patched(plans, "forget_others", forget_all_plans_but_one)),
    Mistake("plans are never collected", BUILD, _patched(plans, "forget_others", keep_all_plans)),
    Mistake("build at the first inference", "first install that is built", _patched(upkeep.Upkeep, "build", build_at_the_first_inference)),
    Mistake("plans of another engine's version are left", UPGRADE, _patched(upkeep.Upkeep, "outdated", lambda self: "")),
    Mistake("plans: no fsync of files", UPGRADE, make_disk=NoFileSync),
    Mistake("plan of a killed start taken for durable", "first install that is built", _patched(plans, "settle", lambda layout: None), kills=True),
    Mistake("folders of a killed start taken for durable", "first install", _patched(artifact.Layout, "sync", no_sync_of_the_layout), kills=True),
)  # fmt: skip

ENROLMENT_MISTAKES = (
    Mistake("enrolment: no fsync of files", "enrolment", make_disk=NoFileSync),
    Mistake("enrolment: in-place write", "enrolment", _patched(atomic, "write", write_in_place)),
    Mistake("enrolment: the last file first", "enrolment", _patched(enroll, "keep", keep_enrolment_backwards)),
)

SPOOL_MISTAKES = (
    Mistake("spool: no fsync of files", "spool", make_disk=NoFileSync),
    Mistake("spool: no fsync of folders", "spool", make_disk=NoFolderSync),
    Mistake("spool: append without fsync", "spool", _patched(atomic, "append", append_without_sync)),
    Mistake("spool: a segment's name is not synced", "spool", _patched(atomic, "append", append_without_folder_sync)),
    Mistake("spool: no checksum", "spool", _patched(event_records, "record_at", record_without_checksum)),
    Mistake("spool: removed before it is counted", "spool", _patched(event_store.EventStore, "_give_up", remove_before_counting)),
    Mistake("spool: counted, and not said what", "spool", _patched(event_store.EventStore, "_write_given_up", count_without_naming)),
    Mistake("spool: sent is taken for stored", "spool", _patched(spool.Spool, "_send", remove_what_was_sent)),
    Mistake("spool: outcomes are given up with the rest", "spool", _patched(event_store.EventStore, "_make_room", oldest_first_whatever_it_is)),
)  # fmt: skip
