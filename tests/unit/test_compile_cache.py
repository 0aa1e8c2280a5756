"""The compile cache: everything is made once, and what nobody uses does not fill the disk."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from edgefleet_controller.compile import cache_limit
from edgefleet_controller.compile.cache import Cache
from edgefleet_controller.compile.worker import JobRequest

KIB = 1024
DAY_S = 24 * 3600.0


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", lambda: None)


def fill(folder: Path) -> None:
    (folder / "model").write_bytes(b"x" * 64 * KIB)


def made(cache: Cache, key: str, unused_days: float, kind: str = "compiled") -> Path:
    folder = cache.once(kind, key, fill)
    at = time.time() - unused_days * DAY_S
    os.utime(folder, (at, at))
    return folder


def tidied(cache: Cache, limit_kib: int) -> int:
    return cache_limit.keep_within(cache.folder, limit_kib * KIB, time.time())


def test_above_the_limit_the_longest_unused_go_first(cache: Cache) -> None:
    oldest, older, newer = made(cache, "a", 9), made(cache, "b", 5, "prepared"), made(cache, "c", 2)
    assert tidied(cache, 150) == 128 * KIB
    assert not oldest.exists()
    assert older.exists()
    assert (newer / "model").read_bytes() == b"x" * 64 * KIB


def test_below_the_limit_everything_stays(cache: Cache) -> None:
    folders = [made(cache, key, 400) for key in "abc"]
    assert tidied(cache, 1000) == 3 * 64 * KIB
    assert all(folder.exists() for folder in folders)


def test_what_was_used_today_stays_whatever_the_limit_says(cache: Cache) -> None:
    used, unused = made(cache, "used", 0.5), made(cache, "unused", 1.5)
    assert tidied(cache, 1) == 64 * KIB
    assert used.exists()
    assert not unused.exists()


def test_a_hit_is_a_use(cache: Cache) -> None:
    folder = made(cache, "a", 30)
    assert cache.once("compiled", "a", lambda _: pytest.fail("it is there")) == folder
    looked_at = made(cache, "b", 30)
    assert cache.path("compiled", "b") == looked_at
    tidied(cache, 1)
    assert folder.exists()
    assert looked_at.exists()


def test_what_was_removed_is_made_again(cache: Cache) -> None:
    folder = made(cache, "a", 30)
    tidied(cache, 1)
    assert not folder.exists()
    assert (cache.once("compiled", "a", fill) / "model").exists()


def test_what_killed_writers_left_goes_and_what_is_being_written_stays(cache: Cache) -> None:
    kinds = cache.folder / "compiled"
    made(cache, "a", 0)
    left, current = kinds / ".filling-dead", kinds / ".filling-alive"
    for folder in (left, current):
        folder.mkdir()
        fill(folder)
    at = time.time() - 2 * DAY_S
    os.utime(left, (at, at))
    tidied(cache, 1000)
    assert not left.exists()
    assert current.exists()
    assert [path.name for path in kinds.iterdir() if path.name.startswith(".")] == [".filling-alive"]


def test_toolchains_and_packages_are_not_its_business(cache: Cache) -> None:
    others = [made(cache, "a", 400, kind) for kind in ("toolchains", "packages", "photos")]
    assert tidied(cache, 1) == 0
    assert all(folder.exists() for folder in others)


def test_nothing_is_removed_under_a_job_that_looks(cache: Cache) -> None:
    folder = made(cache, "a", 30)
    with cache_limit.looking(cache.folder):
        tidying = threading.Thread(target=tidied, args=(cache, 1))
        tidying.start()
        tidying.join(0.3)
        assert folder.exists()
        assert cache_limit.mark_used(folder)
    tidying.join(10)
    assert folder.exists()  # it was used before it could be removed


def test_an_empty_cache_needs_no_tidying(tmp_path: Path) -> None:
    assert cache_limit.keep_within(tmp_path / "nothing", 1, time.time()) == 0


def test_a_job_leaves_the_cache_within_its_limit_also_when_it_fails(cache: Cache, tmp_path: Path) -> None:
    folder = made(cache, "a", 30)
    request = JobRequest(
        layout=str(tmp_path), cache=str(cache.folder), cache_limit_bytes=1, version="sha256:" + "0" * 64,
        device_class='{"kind": "DeviceClass", "metadata": {"name": "any"}, "spec": {"arch": "x86_64", "engine": "onnxruntime"}}',
    )  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-m", "edgefleet_controller.compile.worker"],
        input=msgspec.json.encode(request) + b"\n", capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert msgspec.json.decode(ended.stdout.splitlines()[-1])["type"] == "failed"
    assert not folder.exists()
