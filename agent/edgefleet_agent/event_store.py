"""Stage 9, health: events that wait, on the disk. Receives numbered events, hands them out again after any cut until they are acknowledged.

::

    <state>/spool/00000017-health.seg   one start's health events; a new file when it is large enough
    <state>/spool/00000018-other.seg    the same for everything else, so that health can be given up first
    <state>/spool/dropped.json          what was given up so far, by kind, and in which segments it was

A segment is only ever appended to, by the start of the agent that began it (:mod:`edgefleet_agent.event_records`). An append is one write
and one fsync; what a cut leaves of one that had not come through fails its checksum. What rotted costs itself: what stands behind it is found, and what is
missing is counted once the controller has come that far. Segments go whole: when all of it is acknowledged, or the oldest health, then the oldest of the rest,
when there would be more than ``limit_bytes``. Counting comes before removing, and names what is removed, so that a cut between the two
neither forgets nor counts twice. Sending and numbering: :mod:`edgefleet_agent.spool`.
"""

from __future__ import annotations

import logging
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from edgefleet_shared import atomic
from edgefleet_shared.errors import ArtifactError, EnvironmentProblem
from edgefleet_shared.files import FileSystem
from edgefleet_shared.malformed import MALFORMED

from edgefleet_agent.event_records import RECORD, Hole, find, header, record, record_at, unmarked

log = logging.getLogger(__name__)

Lane = Literal["health", "other"]
LANES: tuple[Lane, Lane] = ("health", "other")

MAX_SEGMENT_BYTES = 128 * 1024  # what is held in memory of a lane while it is sent
SEGMENTS = 16  # as many at least share the bound, so that giving one up loses a sixteenth
OTHER_SHARE = 0.75  # of the bound, for what is not health: so that health never takes its place, nor it all of health's
BLOCK_BYTES = 4096  # what the smallest file takes of a disk
MAX_HEADER_BYTES = 128

_NAME = re.compile(r"(\d{8})-(health|other)\.seg")


class GivenUp(msgspec.Struct, frozen=True, kw_only=True):
    """``dropped.json``: events by kind, the numbers of the segments that went last, and by boot up to which number what is missing is counted."""

    kinds: dict[str, int] = {}
    segments: tuple[int, ...] = ()
    missing: dict[str, int] = {}


class _Kind(msgspec.Struct):
    type: str


class _Tagged(msgspec.Struct):
    """As much of an event as says its kind."""

    body: _Kind


def kind_of(content: bytes) -> str:
    """The kind of an event's body, as the wire names it."""
    return msgspec.json.decode(content, type=_Tagged).body.type


class Segment:
    """A file of one boot and lane: where each sequence number's record begins, and where some are missing."""

    __slots__ = ("boot", "holes", "lane", "number", "offsets", "path", "sequences", "size_bytes")

    def __init__(self, path: Path, number: int, lane: Lane, boot: str) -> None:
        self.path, self.number, self.lane, self.boot = path, number, lane, boot
        self.sequences, self.offsets, self.holes = array("Q"), array("I"), list[Hole]()
        self.size_bytes = 0

    @property
    def disk_bytes(self) -> int:
        return _blocks(self.size_bytes)

    def keep(self, indices: Iterable[int]) -> None:
        """Only these of its events are still wanted from here."""
        kept = list(indices)
        self.sequences = array("Q", (self.sequences[index] for index in kept))
        self.offsets = array("I", (self.offsets[index] for index in kept))


class EventStore:
    """The segments of a spool folder. Not for several threads.

    Args:
        boot: this start's name, for what is appended.
        limit_bytes: of the segments, together.
    """

    def __init__(self, folder: Path, boot: str, limit_bytes: int, files: FileSystem) -> None:
        self._folder, self._boot, self._files = folder, boot, files
        self._limit = limit_bytes
        self._segment_bytes = max(BLOCK_BYTES, min(MAX_SEGMENT_BYTES, limit_bytes // SEGMENTS))
        self._segments: list[Segment] = []
        self._open: dict[Lane, Segment] = {}
        self._floors: dict[str, int] = {}
        self._waste: list[Path] = []
        self._next = 1
        self._held: dict[Lane, tuple[Path, bytes]] = {}
        self._given_up = GivenUp()
        self._counted = True
        self.loaded = False

    @property
    def dropped(self) -> dict[str, int]:
        """Events given up since the enrolment, by kind."""
        return self._given_up.kinds

    def load(self) -> None:
        """Find what earlier starts left.

        Raises:
            EnvironmentProblem: the disk can't be read; nothing is loaded.
        """
        files, folder = self._files, self._folder
        atomic.make_folder(folder, 0o700, files=files)
        with atomic.disk_errors(folder, "list"):
            names = files.names(folder)
        before = self._read_given_up()
        segments, waste = list[Segment](), list[Path]()
        numbers = set(before.segments)
        for name in sorted(names):
            match = _NAME.fullmatch(name)
            if match is None:
                if name.endswith(".tmp"):
                    waste.append(folder / name)
                continue
            number, lane = int(match[1]), LANES[match[2] == "other"]
            numbers.add(number)
            try:
                found = None if number in before.segments else self._read_segment(folder / name, number, lane)
            except EnvironmentProblem as exc:
                log.error("segment unreadable", extra={"reason": str(exc)})  # the next start tries again
                continue
            if found is None:
                waste.append(folder / name)
            else:
                segments.append(found)
        _without_repetitions(segments)
        self._segments = [segment for segment in segments if segment.sequences]
        self._waste = waste + [segment.path for segment in segments if not segment.sequences]
        self._next = max(numbers, default=0) + 1
        self._given_up = msgspec.structs.replace(before, kinds=_sum(before.kinds, self._given_up.kinds))
        self.loaded = True
        self.collect()

    def append(self, lane: Lane, events: Sequence[tuple[int, bytes]]) -> None:
        """Keep events of this boot, ascending, durably: when this returns, no cut takes them.

        Raises:
            EnvironmentProblem: none of them counts as kept.
        """
        self.collect()
        self._make_room(lane, sum(RECORD.size + len(content) for _, content in events))
        segment = self._segment(lane)
        piece, offsets = b"" if segment.size_bytes else header(self._boot), list[int]()
        for sequence, content in events:
            offsets.append(segment.size_bytes + len(piece))
            piece += record(sequence, content, marked=not piece)
        if not self._counted:
            self._write_given_up(self._given_up)
        self._open.pop(lane, None)  # a failed append ends it: see atomic.append
        self._next = max(self._next, segment.number + 1)
        try:
            atomic.append(segment.path, piece, segment.size_bytes, files=self._files)
        except EnvironmentProblem:
            if not segment.size_bytes:
                self._waste.append(segment.path)
            raise
        self._held.pop(lane, None)
        self._open[lane] = segment
        segment.size_bytes += len(piece)
        segment.sequences.extend(sequence for sequence, _ in events)
        segment.offsets.extend(offsets)
        if segment not in self._segments:
            self._segments.append(segment)

    def floor(self, boot: str) -> int:
        """Up to where a boot's events are acknowledged, as far as this start knows."""
        return self._floors.get(boot, 0)

    def boots(self) -> list[str]:
        """The boots of what waits, the oldest first."""
        return list(dict.fromkeys(segment.boot for segment in self._segments))

    def next_after(self, boot: str, sequence: int) -> int | None:
        """The lowest sequence number of a boot above ``sequence``, and above what is acknowledged."""
        found = self._find(boot, max(sequence, self._floors.get(boot, 0)))
        return found[0].sequences[found[1]] if found else None

    def read(self, boot: str, sequence: int) -> bytes:
        """The event of that number, which :meth:`next_after` named.

        Raises:
            EnvironmentProblem: it can't be read, or is damaged.
        """
        found = self._find(boot, sequence - 1)
        if found is None or found[0].sequences[found[1]] != sequence:
            raise KeyError(sequence)
        segment, index = found
        held = self._held.get(segment.lane)
        if held is None or held[0] != segment.path:
            try:
                held = segment.path, atomic.read(segment.path, files=self._files)
            except FileNotFoundError as exc:
                raise EnvironmentProblem(f"{segment.path} is gone") from exc
            self._held[segment.lane] = held
        whole = record_at(held[1], segment.offsets[index])
        if whole is None or whole[0] != sequence:
            raise EnvironmentProblem(f"event {sequence} in {segment.path} is damaged")
        return unmarked(whole[1])

    def give_up_unreadable(self, boot: str, sequence: int) -> None:
        """Count what can't be read any more of the segment of that event, and pass over it. What can be read of it stays.

        In memory first: the disk that can't be read may refuse to be written, too. The file is left to the next start.
        """
        found = self._find(boot, sequence - 1)
        if found is None:
            return
        segment = found[0]
        if self._open.get(segment.lane) is segment:
            del self._open[segment.lane]  # what follows goes to a file that is sound
        kept = [i for i, number in enumerate(segment.sequences) if self._readable(boot, number)]
        waited = len(segment.sequences) - bisect_right(segment.sequences, self.floor(boot))
        numbers = {*segment.sequences, sequence}
        segment.keep(kept)
        numbers -= {*segment.sequences}
        left = len(segment.sequences) - bisect_right(segment.sequences, self.floor(boot))
        self.count_dropped("unreadable", waited - left, (boot, max(numbers)))
        log.error("events unreadable", extra={"count": waited - left, "reason": str(segment.path)})
        if not segment.sequences:
            self._segments.remove(segment)

    def _readable(self, boot: str, sequence: int) -> bool:
        try:
            self.read(boot, sequence)
        except EnvironmentProblem:
            return False
        return True

    def acknowledge(self, boot: str, sequence: int) -> None:
        """Everything of ``boot`` up to ``sequence`` is with the controller: segments that hold nothing else go."""
        self._floors[boot] = max(sequence, self._floors.get(boot, 0))
        for segment in [s for s in self._segments if s.boot == boot]:
            self._count_missing(segment, self._floors[boot])
            if segment.sequences[-1] <= self._floors[boot]:
                self._take_out(segment)
        if boot != self._boot and boot not in self.boots():
            del self._floors[boot]
            self._given_up.missing.pop(boot, None)
        self.collect()

    def collect(self) -> None:
        """Remove the files that nobody needs any more; what the disk refuses now is tried again next time."""
        for path in list(self._waste):
            try:
                atomic.remove(path, files=self._files)
            except EnvironmentProblem as exc:
                log.warning("segment not removed", extra={"reason": str(exc)})
                self._waste.remove(path)
                self._waste.append(path)  # what stands behind it has its turn next time: it would outgrow the bound
                return
            self._waste.remove(path)

    def count_dropped(self, kind: str, count: int = 1, missing: tuple[str, int] | None = None) -> None:
        """Events were given up, and no file with them; the count comes to the disk with the next append. With ``missing``, a boot and a number
        up to which that counts what its segments lack."""
        before = self._given_up
        lacked = before.missing | dict([missing] if missing else [])
        self._given_up = msgspec.structs.replace(before, kinds=_sum(before.kinds, {kind: count}), missing=lacked)
        self._counted = False

    # -- inside --------------------------------------------------------------------------------------------------------

    def _find(self, boot: str, above: int) -> tuple[Segment, int] | None:
        best: tuple[Segment, int] | None = None
        for segment in self._segments:
            if segment.boot != boot:
                continue
            index = bisect_right(segment.sequences, above)
            if index == len(segment.sequences):
                continue
            if best is None or segment.sequences[index] < best[0].sequences[best[1]]:
                best = segment, index
        return best

    def _segment(self, lane: Lane) -> Segment:
        """The one that is appended to: a new one when there is none, or it is large enough."""
        segment = self._open.get(lane)
        if segment is not None and segment.size_bytes < self._segment_bytes:
            return segment
        return Segment(self._folder / f"{self._next:08}-{lane}.seg", self._next, lane, self._boot)

    def _make_room(self, lane: Lane, piece_bytes: int) -> None:
        """Give up the oldest until the bound holds: of the rest when it would take more than its share, else of health."""

        def over(bound: float, *lanes: Lane) -> bool:
            segment = self._segment(lane)
            needed = _blocks(segment.size_bytes + MAX_HEADER_BYTES + piece_bytes) - segment.disk_bytes
            return sum(s.disk_bytes for s in self._segments if s.lane in lanes) + needed > bound

        while lane == "other" and over(self._limit * OTHER_SHARE, lane) and self._give_up_oldest(lane):
            pass
        while over(self._limit, *LANES) and self._give_up_oldest("health"):
            pass

    def _give_up_oldest(self, lane: Lane) -> bool:
        oldest = min((s for s in self._segments if s.lane == lane), key=lambda s: s.number, default=None)
        if oldest is not None:
            self._give_up(oldest)
        return oldest is not None

    def _give_up(self, segment: Segment) -> None:
        self._count_missing(segment, segment.sequences[-1])
        kinds: dict[str, int] = {}
        first = bisect_right(segment.sequences, self._floors.get(segment.boot, 0))
        if segment.lane == "health":
            kinds["health"] = len(segment.sequences) - first
        else:
            for sequence in segment.sequences[first:]:
                try:
                    kind = kind_of(self.read(segment.boot, sequence))
                except EnvironmentProblem:
                    kind = "unreadable"
                kinds = _sum(kinds, {kind: 1})
        given_up = msgspec.structs.replace(self._given_up, kinds=_sum(self.dropped, kinds), segments=(segment.number,))
        self._write_given_up(given_up)
        log.warning(
            "events given up", extra={"count": sum(kinds.values()), "reason": f"the spool holds {self._limit} bytes"}
        )
        self._take_out(segment)
        self.collect()

    def _count_missing(self, segment: Segment, up_to: int) -> None:
        """Count what is missing of a segment, and of which the controller has not come beyond ``up_to``, the number before it. What a cut left of
        its last append had never been safe."""
        boot = segment.boot
        for hole in [hole for hole in segment.holes if hole.after <= up_to]:
            segment.holes.remove(hole)
            first = max(hole.after, self.floor(boot), self._given_up.missing.get(boot, 0)) + 1
            others = [s for s in self._segments if s.boot == boot]
            if not hole.sure and not any(s.lane == segment.lane and s.number > segment.number for s in others):
                continue
            lost = set(range(first, hole.before)).difference(*(s.sequences for s in others))
            if lost:
                self.count_dropped("unreadable", len(lost), (boot, hole.before - 1))
                log.error("events unreadable", extra={"count": len(lost), "reason": str(segment.path)})

    def _take_out(self, segment: Segment) -> None:
        self._segments.remove(segment)
        self._waste.append(segment.path)
        if self._open.get(segment.lane) is segment:
            del self._open[segment.lane]
        if self._held.get(segment.lane, (None,))[0] == segment.path:
            del self._held[segment.lane]

    def _read_given_up(self) -> GivenUp:
        path = self._folder / "dropped.json"
        try:
            return msgspec.json.decode(atomic.read_or_damaged(path, False, files=self._files), type=GivenUp)
        except FileNotFoundError:
            return GivenUp()
        except (ArtifactError, *MALFORMED) as exc:
            log.error(
                "dropped.json damaged",
                extra={"reason": str(exc), "kept_as": str(atomic.set_aside(path, files=self._files))},
            )
            return GivenUp()

    def _write_given_up(self, given_up: GivenUp) -> None:
        atomic.write(self._folder / "dropped.json", msgspec.json.encode(given_up), 0o600, files=self._files)
        self._given_up, self._counted = given_up, True

    def _read_segment(self, path: Path, number: int, lane: Lane) -> Segment | None:
        """What is whole of a segment; None when nothing is."""
        content = atomic.read(path, files=self._files)
        found = find(content)
        if found is None:
            return None
        segment = Segment(path, number, lane, found.boot)
        segment.sequences, segment.offsets = array("Q", found.sequences), array("I", found.offsets)
        segment.holes, segment.size_bytes = found.holes, len(content)
        return segment


def _blocks(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _without_repetitions(segments: list[Segment]) -> None:
    """An append whose fsync failed was made again in the next segment: what is there twice counts once."""
    seen: dict[str, set[int]] = {}
    for segment in segments:
        had = seen.setdefault(segment.boot, set())
        fresh = [index for index, sequence in enumerate(segment.sequences) if sequence not in had]
        had.update(segment.sequences)
        segment.keep(fresh)


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {kind: one.get(kind, 0) + other.get(kind, 0) for kind in (*one, *(k for k in other if k not in one))}
