"""Cuts through the spool: what was stored comes to the controller once, whatever is cut; what was given up is counted once.

A script of what happens to a board's events is played on a disk in memory, with a controller that stores and acknowledges as the real
one does and that no cut touches. After each change of the disk every state that a cut can leave is taken up by a new start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from edgefleet_agent.event_store import kind_of
from edgefleet_agent.spool import Spool
from edgefleet_shared.clock import ManualClock
from edgefleet_shared.messages import Ack, Dropped, Ended, Event, Health, OutcomeTold, decode
from edgefleet_shared.outcomes import Outcome
from support.disk import MemoryDisk, Tree, key_of, remains

FOLDER = Path("/board-in-memory/state/spool")
FLUSH_S = 60.0
LIMIT_BYTES = 5 * 4096
MAX_ROUNDS = 500

Key = tuple[str, int]


@dataclass
class Receiver:
    """The controller's end: stores each (boot, number) once, acknowledges what is there without a gap."""

    have: dict[Key, bytes] = field(default_factory=dict)
    floors: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Receiver:
        return Receiver(dict(self.have), dict(self.floors))

    def take(self, batch: Iterable[bytes]) -> list[Ack]:
        boots: dict[str, int] = {}
        for content in batch:
            event = decode(content, Event)
            key = (event.boot, event.sequence)
            assert self.have.setdefault(key, content) == content, f"{key} was given to two events"
            boots.setdefault(event.boot, 0)
            if isinstance(event.body, Dropped):
                about, up_to = event.body.earlier or (event.boot, event.body.up_to)
                boots[about] = max(boots.get(about, 0), up_to)
        for boot, given_up in boots.items():
            floor = max(self.floors.get(boot, 0), given_up)
            while (boot, floor + 1) in self.have:
                floor += 1
            self.floors[boot] = floor
        return [Ack(boot, self.floors[boot]) for boot in boots]


class Board:
    """One start of the agent's spool on a disk, and what it may promise by now."""

    def __init__(
        self, disk: MemoryDisk, receiver: Receiver, boot: str, loses: Callable[[int], bool] = lambda n: False,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:  # fmt: skip
        self.clock, self.receiver, self.boot = ManualClock(), receiver, boot
        self.line: deque[bytes] = deque()
        self.added: set[Key] = set()
        self.promised: set[Key] = set()
        self._others: set[Key] = set()
        self._sent = 0
        self._loses = loses
        self._sequence = 0
        self.spool = Spool(
            FOLDER, "b1", boot, self._publish, self.clock, limit_bytes=limit_bytes, flush_s=FLUSH_S, files=disk
        )
        self.spool.tick()

    def _publish(self, content: bytes) -> None:
        self._sent += 1
        event = decode(content, Event)
        if event.boot == self.boot:  # a Dropped takes a number too
            self._sequence = max(self._sequence, event.sequence)
        if not self._loses(self._sent):
            self.line.append(content)

    def health(self, count: int) -> None:
        for _ in range(count):
            self._sequence += 1
            self.added.add((self.boot, self._sequence))
            self.spool.add(Health(model="toy", version="1", requests=self._sequence))

    def outcome(self) -> None:
        self._sequence += 1
        key = (self.boot, self._sequence)
        self.added.add(key)
        self._others.add(key)
        ended = Ended(assignment=f"a{self._sequence}", manifest="m", outcome=Outcome.SUCCEEDED)
        self.spool.add(OutcomeTold(ended=ended))
        self.promised |= self._others

    def wait(self) -> None:
        """Long enough for all that waits to be written."""
        self.clock.advance(FLUSH_S)
        self.spool.tick()
        self.promised |= self.added

    def exchange(self) -> None:
        """With the line up, until nothing is said any more."""
        if not self.spool.up:
            self.spool.came_up()
        quiet = 0
        for _ in range(MAX_ROUNDS):
            batch = list(self.line)
            self.line.clear()
            for ack in self.receiver.take(batch):
                self.spool.acknowledge(ack)
            quiet = 0 if batch else quiet + 1
            if quiet > 2:
                return
            if not batch:
                self.clock.advance(31.0)  # nobody answered: it is sent again
                self.spool.tick()
        raise AssertionError("it never comes to rest")


def play(board: Board) -> None:
    """Offline for long: more than the disk may hold; then online, then offline again, then it ends."""
    board.outcome()
    for _ in range(4):
        board.health(13)
        board.wait()
    board.outcome()
    board.health(14)
    board.wait()
    board.exchange()
    board.spool.up = False
    board.health(3)
    board.outcome()
    board.spool.close()
    board.promised |= board.added


@dataclass(frozen=True)
class Found:
    tree: Tree
    receiver: Receiver
    promised: frozenset[Key]
    added: frozenset[Key]
    depth: int
    trail: str


@dataclass
class SpoolExplorer:
    """Like :class:`chaos.explorer.Explorer`, for the spool alone."""

    make_disk: Callable[[Tree], MemoryDisk] = MemoryDisk
    limit: int = 20
    boot_of: Callable[[int], str] = "boot-{}".format
    met: int = 0
    recovered: int = 0
    failures: list[str] = field(default_factory=list)

    def explore(self, depth: int) -> None:
        self._seen: set[object] = set()
        self._todo: deque[Found] = deque()
        tree: Tree = {"/board-in-memory": None, "/board-in-memory/state": None}
        self._live(Found(tree, Receiver(), frozenset(), frozenset(), 0, "spool"), depth)
        while self._todo and len(self.failures) < self.limit:
            self.recovered += 1
            self._live(self._todo.popleft(), depth)

    def _live(self, found: Found, depth: int) -> None:
        disk = self.make_disk(found.tree)
        receiver = found.receiver.copy()
        try:
            board: Board | None = None

            def after(operation: str, path: str) -> None:
                if found.depth >= depth:
                    return
                promised, added = found.promised, found.added
                if board is not None:
                    promised, added = promised | board.promised, added | board.added
                trail = f"{found.trail}; cut after {len(disk.log)} {operation} {path.rpartition('/')[2]}"
                for tree in remains(disk):
                    self._note(Found(tree, receiver.copy(), promised, added, found.depth + 1, trail))

            disk.after = after
            # A start that must give up counts what the controller may have already; here every count is to be exact.
            board = Board(
                disk, receiver, self.boot_of(found.depth), limit_bytes=LIMIT_BYTES if found.depth == 0 else 1 << 20
            )
            if found.depth == 0:
                play(board)
            else:
                board.health(2)
                board.outcome()
                board.exchange()
                self._check(board, found, disk)
        except Exception as exc:  # noqa: BLE001 - whatever goes wrong is a finding
            self.failures.append(f"{found.trail}: {type(exc).__name__}: {exc}")

    def _note(self, found: Found) -> None:
        self.met += 1
        key = (key_of(found.tree), frozenset(found.receiver.have), found.promised, found.depth)
        if key not in self._seen:
            self._seen.add(key)
            self._todo.append(found)

    def _check(self, board: Board, found: Found, disk: MemoryDisk) -> None:
        missing = (found.promised | board.promised) - set(board.receiver.have)
        dropped = board.spool.dropped
        assert sum(dropped.values()) == len(missing), f"{len(missing)} are lost, {dropped} were told"
        assert not dropped.get("outcome"), "an outcome was given up while there was health to give up"
        left = [name for name in disk.calm().names(FOLDER) if name != "dropped.json"]
        assert not left, f"{left} are left though everything is acknowledged"


def kinds(receiver: Receiver) -> dict[str, int]:
    """How many events of each kind have come."""
    found: dict[str, int] = {}
    for content in receiver.have.values():
        kind = kind_of(content)
        found[kind] = found.get(kind, 0) + 1
    return found


def given_up_on_disk(disk: MemoryDisk) -> dict[str, int]:
    """``dropped.json``'s counts as they are on the disk."""
    content = disk.tree().get(str(FOLDER / "dropped.json"))
    return dict(msgspec.json.decode(content)["kinds"]) if content else {}
