"""The compile cache: everything is made once, and what nobody uses does not fill the disk."""

from __future__ import annotations

import os
import re
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
    others = [cache.folder / kind / "a" for kind in ("toolchains", "packages", "photos")]
    for folder in others:
        folder.mkdir(parents=True)
        fill(folder)
        os.utime(folder, (0, 0))
    assert tidied(cache, 1) == 0
    assert all(folder.exists() for folder in others)


def test_everything_that_the_compiler_keeps_is_cleared_away_some_day(cache: Cache) -> None:
    compiler = Path(cache_limit.__file__).parent
    code = "".join(file.read_text(encoding="utf-8") for file in compiler.glob("*.py"))
    kept = set(re.findall(r"\.(?:once|all|path)\(\s*\"(\w+)\"", code))
    assert kept >= {"compiled", "halved", "described", "answers"}
    folders = [made(cache, "a", 400, kind) for kind in sorted(kept)]
    assert tidied(cache, 1) == 0
    assert not any(folder.exists() for folder in folders)


def test_what_would_never_be_cleared_away_is_not_kept(cache: Cache) -> None:
    with pytest.raises(ValueError, match="nobody would ever clear odds away"):
        cache.once("odds", "a", fill)


@pytest.mark.parametrize("harm", ["cut short", "empty", "a bit", "missing", "nothing said of it"])
def test_what_is_not_what_it_was_is_made_again(cache: Cache, harm: str) -> None:
    folder = made(cache, "a", 0)
    model = folder / "model"
    match harm:
        case "cut short":
            model.write_bytes(model.read_bytes()[:100])
        case "empty":
            model.write_bytes(b"")
        case "a bit":
            model.write_bytes(b"y" + model.read_bytes()[1:])
        case "missing":
            model.unlink()
        case _:
            for file in folder.iterdir():
                if file != model:
                    file.write_bytes(b"")
    later = Cache(cache.folder, lambda: None)
    assert (later.once("compiled", "a", fill) / "model").read_bytes() == b"x" * 64 * KIB
    assert not [path.name for path in folder.parent.iterdir() if path != folder], "nothing is left beside it"
    again = Cache(cache.folder, lambda: None)
    assert again.once("compiled", "a", lambda _: pytest.fail("it is whole again")) == folder


def test_what_was_harmed_is_not_told_to_be_there(cache: Cache) -> None:
    (made(cache, "a", 0) / "model").write_bytes(b"")
    assert not Cache(cache.folder, lambda: None).path("compiled", "a").exists()


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


def test_what_is_being_filled_stays_when_the_clock_is_set_ahead(cache: Cache) -> None:
    def fill(folder: Path) -> None:
        cache_limit.keep_within(cache.folder, 0, time.time() + 3 * cache_limit.IN_USE_S)
        (folder / "made").write_bytes(b"whole")

    assert (cache.once("compiled", "one", fill) / "made").read_bytes() == b"whole"
