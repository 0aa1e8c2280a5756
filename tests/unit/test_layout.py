"""A layout and a cache with several writers at once, as a controller has that compiles for two classes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from edgefleet_shared import atomic
from edgefleet_shared.artifact import Layout, digest_of

WRITERS, ROUNDS = 8, 60


def together(write: Callable[[int, int], object]) -> None:
    """Call ``write(writer, round)`` from all writers at the same moment, round after round."""
    start = threading.Barrier(WRITERS)

    def writer(number: int) -> None:
        try:
            for turn in range(ROUNDS):
                start.wait(timeout=30)
                write(number, turn)
        except BaseException:
            start.abort()  # or the others would wait for this one
            raise

    with ThreadPoolExecutor(WRITERS) as pool:
        for done in [pool.submit(writer, number) for number in range(WRITERS)]:
            done.result()


def test_the_same_blob_may_be_stored_by_several_writers_at_once(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    together(lambda _, turn: layout.put(b"golden %d" % turn))
    assert set(layout.digests()) == {digest_of(b"golden %d" % turn) for turn in range(ROUNDS)}
    assert not list(layout.unfinished())


def test_a_new_layout_may_be_opened_by_several_writers_at_once(tmp_path: Path) -> None:
    together(lambda _, turn: Layout(tmp_path / f"layout-{turn}").put(b"golden"))


def test_what_a_cache_holds_under_a_name_may_be_written_by_several_at_once(tmp_path: Path) -> None:
    """By threads here; by processes, whose numbers are in the temporary name as well, in a controller."""

    def write(number: int, turn: int) -> None:
        file = tmp_path / f"{turn}.json"
        atomic.write_shared(file, b"%d" % number * 1000)
        written = file.read_bytes()
        assert written == written[:1] * 1000, "a mixture of two"

    together(write)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{turn}.json" for turn in range(ROUNDS))


def test_files_of_one_name_may_be_stored_by_several_writers_at_once(tmp_path: Path) -> None:
    layout, given = Layout(tmp_path / "layout"), {}
    for number in range(WRITERS):
        source = tmp_path / str(number) / "model.onnx"
        source.parent.mkdir()
        source.write_bytes(os.urandom(300_000 + 1000 * number))
        given[number] = source

    def write(number: int, _: int) -> None:
        layout.check(layout.put_file(given[number]))

    together(write)
    assert set(layout.digests()) == {digest_of(source.read_bytes()) for source in given.values()}
    assert not list(layout.unfinished())


@pytest.mark.parametrize("from_file", [False, True])
def test_what_a_killed_writer_left_is_no_part_of_a_later_blob(tmp_path: Path, from_file: bool) -> None:
    layout, content = Layout(tmp_path / "layout"), b"short"
    left = layout.path(digest_of(content)).with_name(f".in-{os.getpid()}-{threading.get_native_id()}")
    left.write_bytes(b"a longer one")
    if from_file:
        source = tmp_path / "model.onnx"
        source.write_bytes(content)
        stored = layout.put_file(source)
    else:
        stored = layout.put(content)
    layout.check(stored)
    assert not left.exists()


def test_a_folder_that_is_named_like_a_blob_is_nobodys_blob(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    kept = layout.put(b"a blob").digest
    layout.path(digest_of(b"something else")).mkdir()
    assert list(layout.digests()) == [kept]
