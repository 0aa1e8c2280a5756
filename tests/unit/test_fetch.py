"""The fetcher: what it asks for, of whom and when, and what it takes of the disk."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise
from pathlib import Path

import pytest
from edgefleet_agent import fetch
from edgefleet_agent.fetch import FALLBACK_S, WANT_AGAIN_LAST_S, WANT_AGAIN_S, Fetcher
from edgefleet_shared import artifact
from edgefleet_shared.artifact import SCHEMA, AgentConfig, Descriptor, Layout
from edgefleet_shared.clock import ManualClock
from edgefleet_shared.errors import EnvironmentProblem
from edgefleet_shared.files import Disk
from edgefleet_shared.fingerprint import Requirement
from edgefleet_shared.messages import Want

CHUNK_BYTES = 4096
TICK_S = 0.5


class SmallDisk(Disk):
    """A disk with so many bytes free, whatever is written; each read of it takes a while, and what was read is counted."""

    free = 1 << 40
    read_s = 0.0
    read_bytes = 0

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock

    def read(self, fd: int, size_bytes: int) -> bytes:
        self._clock.advance(self.read_s)
        piece = super().read(fd, size_bytes)
        self.read_bytes += len(piece)
        return piece

    def free_bytes(self, folder: Path) -> int:
        return self.free


class Board:
    """A fetcher, the artifact that it is to bring, and what it asked for."""

    def __init__(self, folder: Path, code: bytes = b"code", by_http: bool = True) -> None:
        self.clock = ManualClock()
        self.files = SmallDisk(self.clock)
        self.source = Layout(folder / "controller")
        config = AgentConfig(
            schema=SCHEMA, version="2", device_class="c", requires=Requirement(), chunk_bytes=CHUNK_BYTES
        )
        self.made: Descriptor = artifact.build_agent(self.source, config, code)
        self.wants: list[tuple[float, Want]] = []
        self.fallbacks: list[tuple[float, str]] = []
        self.listened: set[str] = set()
        self.layout = Layout(folder / "board", files=self.files)
        self.beats: list[float] = []
        self.quiet_s = math.inf
        self.fetcher = self.fetcher_of_a_start(by_http)

    def fetcher_of_a_start(self, by_http: bool = True) -> Fetcher:
        return Fetcher(
            self.layout,
            want=lambda want: self.wants.append((self.clock.monotonic(), want)),
            listen=self.listened.add,
            unlisten=self.listened.discard,
            fallback=(lambda digest, *_: self.fallbacks.append((self.clock.monotonic(), digest))) if by_http else None,
            clock=self.clock,
            alive=self.beat,
            quiet_s=lambda: self.quiet_s,
        )

    def beat(self) -> None:
        self.beats.append(self.clock.monotonic())

    def begin(self) -> None:
        self.fetcher.begin(self.made.digest, self.made.size)

    def silence(self, seconds: float) -> None:
        for _ in range(int(seconds / TICK_S)):
            self.clock.advance(TICK_S)
            self.fetcher.tick()

    def bring(self, digest: str, numbers: list[int] | None = None, chunk_bytes: int = artifact.CHUNK_BYTES) -> None:
        content = self.source.path(digest).read_bytes()
        count = artifact.chunk_count(len(content), chunk_bytes)
        for number in range(count) if numbers is None else numbers:
            self.fetcher.chunk(digest, number, content[number * chunk_bytes : (number + 1) * chunk_bytes])

    def bring_all_but_the_code(self) -> str:
        """Manifest and config come; returns the digest of the code, which is wanted next."""
        self.bring(self.made.digest)
        manifest = self.source.manifest(self.made.digest)
        self.bring(manifest.config.digest)
        return manifest.layers[0].digest


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def test_it_asks_for_what_is_missing_for_as_long_as_it_is_whatever_https_does(board: Board) -> None:
    board.begin()
    board.silence(600)
    assert len(board.fallbacks) > 600 / FALLBACK_S - 2
    asked = [at for at, _ in board.wants]
    pauses = [after - before for before, after in pairwise(asked)]
    assert board.clock.monotonic() - asked[-1] <= WANT_AGAIN_LAST_S + TICK_S
    assert max(pauses) <= WANT_AGAIN_LAST_S + TICK_S


def test_what_is_on_its_way_is_not_asked_for_again(board: Board) -> None:
    board.begin()
    board.quiet_s = 1.0
    board.silence(120)
    assert len(board.wants) == 1
    assert board.fallbacks, "who knows whether it ever comes to an end"
    board.quiet_s = 60.0
    board.silence(TICK_S)
    assert len(board.wants) == 2


def test_https_is_tried_after_silence_and_not_at_once(board: Board) -> None:
    board.begin()
    board.silence(FALLBACK_S - TICK_S)
    assert not board.fallbacks
    board.silence(2 * TICK_S)
    assert [digest for _, digest in board.fallbacks] == [board.made.digest]


def test_the_patience_of_one_fetch_is_not_that_of_the_next(board: Board) -> None:
    board.begin()
    board.silence(120)
    board.fetcher.stop()
    board.wants.clear()
    board.begin()
    board.silence(WANT_AGAIN_S + TICK_S)
    assert len(board.wants) == 2, "the first question may be lost like any other"


def test_what_an_earlier_start_brought_needs_no_space_again(tmp_path: Path) -> None:
    board = Board(tmp_path, code=b"".join(hashlib.sha256(bytes([n])).digest() * 128 for n in range(100)))
    board.begin()
    code = board.bring_all_but_the_code()
    board.bring(code, list(range(90)), CHUNK_BYTES)
    board.fetcher = board.fetcher_of_a_start()  # it was killed; meanwhile what is left is about what is missing
    board.files.free = fetch.SPARE_BYTES + 10 * CHUNK_BYTES
    board.begin()
    assert board.wants[-1][1].missing == ((90, 99),)
    board.bring(code, list(range(90, 100)), CHUNK_BYTES)
    assert board.fetcher.finished
    assert board.fetcher.done_bytes == board.fetcher.total_bytes


def test_an_artifact_that_another_slot_has_is_fetched_on_a_full_disk(board: Board) -> None:
    board.begin()
    board.bring(board.bring_all_but_the_code(), chunk_bytes=CHUNK_BYTES)
    assert board.fetcher.finished
    board.files.free = 0
    board.begin()
    assert board.fetcher.finished


def test_what_does_not_fit_is_refused_before_a_byte_of_it_is_asked_for(tmp_path: Path) -> None:
    board = Board(tmp_path, code=bytes(100 * CHUNK_BYTES))
    board.files.free = fetch.SPARE_BYTES + 99 * CHUNK_BYTES
    board.begin()
    with pytest.raises(EnvironmentProblem, match=f"needs {100 * CHUNK_BYTES} bytes"):
        board.bring_all_but_the_code()
    code = board.source.manifest(board.made.digest).layers[0].digest
    assert code not in {want.digest for _, want in board.wants}
    assert code not in board.listened


def test_a_blob_that_came_wrong_is_not_counted_as_come(board: Board) -> None:
    board.begin()
    board.fetcher.chunk(board.made.digest, 0, bytes(board.made.size))
    assert (board.fetcher.done_bytes, board.fetcher.bad_chunks) == (0, 1)


@pytest.mark.parametrize("stage", ["brought in part", "brought whole", "has its name"])
def test_a_disk_that_takes_minutes_to_read_looks_alive_to_the_watchdog(tmp_path: Path, stage: str) -> None:
    board = Board(tmp_path, code=bytes(1000 * CHUNK_BYTES))
    board.begin()
    code = board.bring_all_but_the_code()
    board.bring(code, list(range(1000 if stage == "has its name" else 999)), CHUNK_BYTES)
    board.files.read_s, board.beats = 5.0, [board.clock.monotonic()]
    if stage == "brought whole":
        board.bring(code, [999], CHUNK_BYTES)
    else:
        board.fetcher = board.fetcher_of_a_start()
        board.begin()
    beats = [*board.beats, board.clock.monotonic()]
    assert beats[-1] - beats[0] > 60, "this test shows nothing"
    assert max(after - before for before, after in pairwise(beats)) < 60


def large_code(chunks: int) -> bytes:
    """So many chunks, no two alike."""
    return b"".join(
        hashlib.sha256(number.to_bytes(4, "big")).digest() * (CHUNK_BYTES // 32) for number in range(chunks)
    )


def started_again(board: Board) -> int:
    """The agent starts anew, with what the disk has; returns how many bytes of it were read until it asked for more."""
    board.fetcher = board.fetcher_of_a_start()
    board.wants.clear()
    board.files.read_bytes = 0
    board.begin()
    return board.files.read_bytes


def fetched_in_part(folder: Path, chunks: int = 1000) -> tuple[Board, str, Path]:
    """All but the last hundred chunks came and are safe; returns the board, the code's digest and the file that it grows in."""
    board = Board(folder, code=large_code(chunks))
    board.begin()
    code = board.bring_all_but_the_code()
    board.bring(code, list(range(chunks - 100)), CHUNK_BYTES)
    board.silence(2 * fetch.SAFE_EVERY_S)
    final = board.layout.path(code)
    return board, code, final.with_name(f".part-{final.name}")


def test_a_start_does_not_read_what_is_known_to_be_safe(tmp_path: Path) -> None:
    """On a board that hashes 50 MB/s and is on for half a minute at a time, a large model would never get further."""
    board, code, _ = fetched_in_part(tmp_path)
    assert started_again(board) < 10 * CHUNK_BYTES + 2 * board.made.size + 200_000, "that is the config, and no more"
    assert board.wants[-1][1].missing == ((900, 999),)
    board.bring(code, list(range(900, 1000)), CHUNK_BYTES)
    assert board.fetcher.finished
    assert board.layout.path(code).read_bytes() == large_code(1000)


def test_a_start_does_not_read_a_blob_again_that_was_found_whole(tmp_path: Path) -> None:
    board, code, _ = fetched_in_part(tmp_path)
    board.bring(code, list(range(900, 1000)), CHUNK_BYTES)
    assert board.fetcher.finished
    assert started_again(board) < 10 * CHUNK_BYTES + 2 * board.made.size + 200_000
    assert board.fetcher.finished


def test_what_another_slot_has_is_read_once(tmp_path: Path) -> None:
    board = Board(tmp_path, code=large_code(1000))
    (board.layout.path("sha256:" + hashlib.sha256(large_code(1000)).hexdigest())).write_bytes(large_code(1000))
    board.begin()
    board.bring_all_but_the_code()
    assert board.fetcher.finished
    assert started_again(board) < 10 * CHUNK_BYTES + 2 * board.made.size + 200_000


def test_of_what_rotted_after_it_was_safe_only_that_comes_again(tmp_path: Path) -> None:
    board, code, part = fetched_in_part(tmp_path)
    with part.open("r+b") as file:
        file.seek(17 * CHUNK_BYTES + 5)
        file.write(b"rot")
    started_again(board)
    board.bring(code, list(range(900, 1000)), CHUNK_BYTES)
    assert not board.fetcher.finished
    assert board.wants[-1][1].missing == ((17, 17),)
    assert board.fetcher.done_bytes == board.fetcher.total_bytes - CHUNK_BYTES
    board.bring(code, [17], CHUNK_BYTES)
    assert board.fetcher.finished
    assert board.layout.path(code).read_bytes() == large_code(1000)


@pytest.mark.parametrize("left", ["nothing", "a part of it", "more than it"])
def test_what_was_safe_and_is_not_there_comes_again(tmp_path: Path, left: str) -> None:
    board, code, part = fetched_in_part(tmp_path)
    if left == "nothing":
        part.unlink()
    elif left == "a part of it":
        with part.open("r+b") as file:
            file.truncate(450 * CHUNK_BYTES + 7)
    else:
        with part.open("ab") as file:
            file.write(bytes(200 * CHUNK_BYTES))
    started_again(board)
    for _ in range(3):  # at most: what is asked for, what then proves wrong, and all of it anew
        for first, last in board.wants[-1][1].missing:
            board.bring(code, list(range(first, last + 1)), CHUNK_BYTES)
    assert board.fetcher.finished
    assert board.layout.path(code).read_bytes() == large_code(1000)


def test_a_record_of_what_is_safe_that_is_damaged_or_of_other_chunks_is_not_believed(tmp_path: Path) -> None:
    board, code, part = fetched_in_part(tmp_path)
    (record,) = [path for path in part.parent.iterdir() if path.name.startswith(".safe-")]
    good = record.read_bytes()
    for damaged in (
        b"",
        b"{",
        good.replace(b"4096", b"8192"),
        good[: len(good) // 2],
        b'{"chunk_bytes":4096,"bits":"AA=="}',
    ):
        record.write_bytes(damaged)
        started_again(board)
        assert board.wants[-1][1].missing == ((900, 999),), damaged
    board.bring(code, list(range(900, 1000)), CHUNK_BYTES)
    assert board.fetcher.finished
