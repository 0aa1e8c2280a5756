"""Stage 9, health: events on their way. Receives event bodies, hands on numbered events until the controller has stored them.

Each start of the agent is a new ``boot`` with numbers of its own, so that a number that a power cut made the board forget is never given
twice. What the controller has not acknowledged waits on the disk (:mod:`edgefleet_agent.event_store`) and goes out, under its old boot
and number, before anything newer: the controller counts each (boot, number) once.

Gentle to an SD card: outcomes and refusals are on the disk before they go out; health and progress only when they have waited
``flush_s`` for their acknowledgement, all of them in one append. With the line up nothing of them is ever written; with the line down it
is one append and one fsync in ``flush_s``, 1,440 a day at 60 s, where one for each reading of every 10 s would be 8,640. A power cut
takes at most ``flush_s`` of health.

A disk that refuses costs nothing but memory, up to :data:`MEMORY_BYTES`; then the oldest health goes first. An event that can't be read back
keeps back its own boot for :data:`READ_AGAIN_S`, then it is given up. What was given up is counted by kind. When the controller waits for a number that will not come, a ``Dropped`` event says so, about exactly the gap above what
it has stored: it can't make it pass over an event that is still to come.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edgefleet_shared.clock import Clock
from edgefleet_shared.errors import EnvironmentProblem
from edgefleet_shared.files import DISK, FileSystem
from edgefleet_shared.messages import Ack, Body, Dropped, Event, Health, OutcomeTold, Refused, encode

from edgefleet_agent.event_store import LANES, EventStore, Lane

# Events that go out before one of them is acknowledged, of this boot and of all earlier ones: what a backlog costs in memory. Two windows,
# so that a controller that can't do with an old boot still hears of the present.
WINDOW = 64
MEMORY_BYTES = 256 * 1024  # of events that are not on the disk
FLUSH_BYTES = 32 * 1024  # of them that do not wait for flush_s
RESEND_S = 30.0  # without a word from the controller, while the line is up; twice as long each time
RESEND_LAST_S = 480.0  # each copy waits at the broker as well, of every board, when it is the controller that is away
AGAIN_S = 5.0  # between two tries of what the disk refused
READ_AGAIN_S = 300.0  # what can't be read for so long never will be; everything of its boot waits behind it


class _Fresh(NamedTuple):
    """An event that is not on the disk, since when (monotonic seconds)."""

    sequence: int
    kind: str
    content: bytes
    since: float


class Spool:
    """Unacknowledged events, of this boot and of earlier ones. For the loop's thread alone.

    Args:
        folder: the store's, in the state folder.
        boot: this start's name, never used before.
        publish: sends an event's bytes; called again for what was not acknowledged.
        problem: told why the disk refuses, and "" when it does not any more.
    """

    def __init__(
        self, folder: Path, device: str, boot: str, publish: Callable[[bytes], None], clock: Clock, *,
        limit_bytes: int, flush_s: float, files: FileSystem = DISK, problem: Callable[[str], None] = lambda why: None,
    ) -> None:  # fmt: skip
        self._device, self._boot, self._publish, self._clock = device, boot, publish, clock
        self._flush_s, self._problem = flush_s, problem
        self._store = EventStore(folder, boot, limit_bytes, files)
        self._fresh: dict[Lane, list[_Fresh]] = {lane: [] for lane in LANES}
        self._sequence = 0
        self._cursor: dict[str, int] = {}
        self._in_flight: deque[tuple[str, int]] = deque()
        self._gaps: dict[str, tuple[int, bytes]] = {}  # by boot: up to where, and the event that says so
        self._heard_at = self._again_at = 0.0
        self._patience_s = RESEND_S
        self._troubled = False
        self._unread: dict[str, float] = {}  # boots whose next event can't be read, since when
        self.up = False

    @property
    def dropped(self) -> dict[str, int]:
        """Events given up since the enrolment, by kind."""
        return self._store.dropped

    def add(self, body: Body) -> None:
        """Number an event, keep it, send it when it is its turn."""
        self._add(body)
        self._send()

    def _add(self, body: Body) -> bytes:
        self._sequence += 1
        event = Event(device=self._device, boot=self._boot, sequence=self._sequence, at=self._clock.now(), body=body)
        lane: Lane = "health" if isinstance(body, Health) else "other"
        kind, content = str(body.__struct_config__.tag), encode(event)
        self._fresh[lane].append(_Fresh(self._sequence, kind, content, self._clock.monotonic()))
        if isinstance(body, OutcomeTold | Refused):
            self._flush("other")
        self._bound_memory()
        return content

    def came_up(self) -> None:
        """The line is there: everything that was not acknowledged goes out (again)."""
        self.up, self._patience_s = True, RESEND_S
        self._rewind()

    def acknowledge(self, ack: Ack) -> None:
        """The controller has stored everything of a boot up to a number. One that was never given says nothing: believed, it would have all
        that is still to come taken for stored."""
        if ack.boot != self._boot and ack.boot not in self._store.boots():
            return
        if ack.boot == self._boot and ack.sequence > self._sequence:
            return
        floor = max(ack.sequence, self._store.floor(ack.boot))
        self._store.acknowledge(ack.boot, floor)
        if ack.boot == self._boot:
            for lane, events in self._fresh.items():
                self._fresh[lane] = events[bisect_right(events, floor, key=lambda event: event.sequence) :]
        self._in_flight = deque(sent for sent in self._in_flight if sent[0] != ack.boot or sent[1] > floor)
        self._heard_at, self._patience_s = self._clock.monotonic(), RESEND_S
        self._tell_gap(ack.boot, floor)
        self._send()

    def tick(self) -> None:
        """Do what is due: read what was left, write what waited long enough, send again what nobody answered."""
        now = self._clock.monotonic()
        if now >= self._again_at and (self._troubled or not self._store.loaded):
            self._flush(*LANES)
            self._send()
        elif any(events and now - events[0].since >= self._flush_s for events in self._fresh.values()):
            self._flush(*LANES)
        if self.up and self._in_flight and now - self._heard_at >= self._patience_s:
            self._patience_s = min(2 * self._patience_s, RESEND_LAST_S)
            self._rewind()

    def close(self) -> None:
        """The agent ends: what waits goes to the disk."""
        self._again_at = 0.0
        self._flush(*LANES)

    def __len__(self) -> int:
        """How many events wait in memory alone."""
        return sum(map(len, self._fresh.values()))

    # -- onto the disk -------------------------------------------------------------------------------------------------

    def _flush(self, *lanes: Lane) -> None:
        """Write what waits in these lanes. A disk that has just refused is left alone for a while."""
        now = self._clock.monotonic()
        if now < self._again_at:
            return
        try:
            if not self._store.loaded:
                self._store.load()
            for lane in lanes:
                if self._fresh[lane]:
                    self._store.append(lane, [(event.sequence, event.content) for event in self._fresh[lane]])
                    self._fresh[lane] = []
        except EnvironmentProblem as exc:
            self._trouble(f"events are kept in memory only: {exc}")
        else:
            if self._troubled and not self._unread:
                self._troubled = False
                self._problem("")

    def _trouble(self, what: str) -> None:
        self._troubled, self._again_at = True, self._clock.monotonic() + AGAIN_S
        self._problem(what)

    def _bound_memory(self) -> None:
        if self._fresh_bytes() > FLUSH_BYTES:
            self._flush(*LANES)
        while self._fresh_bytes() > MEMORY_BYTES:
            # Health figures age fastest; outcomes are given up last.
            lane = next(lane for lane in LANES if self._fresh[lane])
            self._store.count_dropped(self._fresh[lane].pop(0).kind)

    def _fresh_bytes(self) -> int:
        return sum(len(event.content) for events in self._fresh.values() for event in events)

    # -- onto the line -------------------------------------------------------------------------------------------------

    def _rewind(self) -> None:
        self._cursor.clear()
        self._in_flight.clear()
        self._heard_at = self._clock.monotonic()
        for _, content in self._gaps.values():
            self._publish(content)
        self._send()

    def _send(self) -> None:
        """Send in order, earlier boots first, as long as the window is open. What can't be read keeps back its own boot alone, and that for a
        while."""
        stuck: set[str] = set()
        while self.up and (found := self._next(stuck)) is not None:
            boot, sequence, content = found
            try:
                content = content or self._store.read(boot, sequence)
            except EnvironmentProblem as exc:
                since = self._unread.setdefault(boot, self._clock.monotonic())
                if self._clock.monotonic() - since >= READ_AGAIN_S:
                    del self._unread[boot]
                    self._store.give_up_unreadable(boot, sequence)
                else:
                    stuck.add(boot)
                    self._trouble(f"events can't be read from the disk: {exc}")
                continue
            self._cursor[boot] = sequence
            self._in_flight.append((boot, sequence))
            self._publish(content)
        self._unread = {boot: since for boot, since in self._unread.items() if boot in stuck}

    def _next(self, stuck: set[str]) -> tuple[str, int, bytes | None] | None:
        """(boot, number, bytes unless they are on the disk) of what goes out next; None when the windows are full too, or the rest is
        ``stuck``."""
        own = sum(boot == self._boot for boot, _ in self._in_flight)
        for boot in self._store.boots() if len(self._in_flight) - own < WINDOW else ():
            if (
                boot not in (self._boot, *stuck)
                and (sequence := self._store.next_after(boot, self._cursor.get(boot, 0))) is not None
            ):
                return boot, sequence, None
        if own >= WINDOW or self._boot in stuck:
            return None
        sequence, content = self._first_after(self._cursor.get(self._boot, 0))
        return (self._boot, sequence, content) if sequence is not None else None

    def _first_after(self, cursor: int) -> tuple[int | None, bytes | None]:
        """This boot's next event above a number."""
        found, content = self._store.next_after(self._boot, cursor), None
        for events in self._fresh.values():
            index = bisect_right(events, cursor, key=lambda event: event.sequence)
            if index < len(events) and (found is None or events[index].sequence < found):
                found, content = events[index].sequence, events[index].content
        return found, content

    def _tell_gap(self, boot: str, floor: int) -> None:
        """When the lowest number that waits is not the next one that the controller wants, those between will never come.

        That is told at once, past the window: what fills it is not acknowledged before.
        """
        if self._gaps.get(boot, (0, b""))[0] <= floor:
            self._gaps.pop(boot, None)
        own = boot == self._boot
        lowest = self._first_after(floor)[0] if own else self._store.next_after(boot, floor)
        if lowest is None or lowest == floor + 1 or boot in self._gaps:
            return
        # A controller that does not know ``earlier`` must not take the number for one of this boot.
        told = Dropped(
            count=lowest - 1 - floor, up_to=lowest - 1 if own else 0, earlier=None if own else (boot, lowest - 1)
        )
        content = self._add(told)
        self._gaps[boot] = lowest - 1, content
        if self.up:
            self._publish(content)
