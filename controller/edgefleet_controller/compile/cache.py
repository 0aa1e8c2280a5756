"""Stage 2, compile: the cache. Receives a kind, a key and what fills a folder, hands on the folder, made once however many jobs want it.

A folder gets its name when it is whole, so that one which is there can be used without a lock; whoever waits for another job's can be
cancelled. It is on the disk before it has its name, and says what lies in it: a folder that a power cut, a bad disk or somebody's hand left
otherwise is known before it is used. Nothing in here is needed to be right: what is missing, or not what it was, is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from edgefleet_shared import atomic
from edgefleet_shared.artifact import digest_file

from edgefleet_controller.compile import cache_limit

What = TypeVar("What")
_LOCK_POLL_S = 0.05


class Cache:
    """Folders by kind and key.

    Args:
        folder: where they lie.
        raise_if_cancelled: raises when the job is not wanted any more.
    """

    def __init__(self, folder: Path, raise_if_cancelled: Callable[[], None]) -> None:
        self.folder = folder
        self._raise_if_cancelled = raise_if_cancelled
        self._looked_at: set[Path] = set()  # once a job: hashing what is used again and again takes its time

    def path(self, kind: str, key: str) -> Path:
        """Where the folder of that kind and key is, if it is; then it counts as used."""
        folder = self.folder / kind / key
        with cache_limit.looking(self.folder):
            there = cache_limit.mark_used(folder)
        if there:
            self._is_whole(folder)
        return folder

    def once(self, kind: str, key: str, fill: Callable[[Path], None]) -> Path:
        """The folder of that kind and key, filled if it is not there."""
        return self.all(kind, {key: None}, lambda staged: fill(next(iter(staged))))[key]

    def all(self, kind: str, wanted: dict[str, What], fill: Callable[[dict[Path, What]], None]) -> dict[str, Path]:
        """The folders of a kind by key, the missing ones filled together.

        Args:
            wanted: what is to be made, by key.
            fill: gets what is missing, by the empty folder that it goes into.
        """
        if kind not in cache_limit.KINDS:
            raise ValueError(f"nobody would ever clear {kind} away: it is none of the cache's kinds")
        folders = {key: self.folder / kind / key for key in wanted}
        with cache_limit.looking(self.folder):
            there = [folder for folder in folders.values() if cache_limit.mark_used(folder)]
        whole = [folder for folder in there if self._is_whole(folder)]
        if len(whole) < len(folders):
            with self._lock(f"{kind}-{content_key(sorted(wanted))}"):
                self._fill({f: wanted[key] for key, f in folders.items() if not f.is_dir()}, fill)
        return folders

    def _is_whole(self, folder: Path) -> bool:
        """Whether a folder that is there holds what was put into it. One that does not is gone afterwards."""
        if folder in self._looked_at:
            return True
        if _sealed(folder):
            self._looked_at.add(folder)
            return True
        gone = Path(tempfile.mkdtemp(dir=folder.parent, prefix=cache_limit.UNFINISHED))
        try:
            os.replace(folder, gone)
        except FileNotFoundError:  # another job found it out, too
            pass
        finally:
            shutil.rmtree(gone, ignore_errors=True)
        return False

    def _fill(self, missing: dict[Path, What], fill: Callable[[dict[Path, What]], None]) -> None:
        """All are staged beside their places, and each gets its name in one step."""
        staged: dict[Path, Path] = {}
        try:
            with ExitStack() as held:
                for folder in missing:
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    staged[folder] = Path(tempfile.mkdtemp(dir=folder.parent, prefix=cache_limit.UNFINISHED))
                    held.enter_context(cache_limit.filling(staged[folder]))
                if staged:
                    fill({staged[folder]: what for folder, what in missing.items()})
                for folder, path in staged.items():
                    _seal(path)
                    try:
                        os.replace(path, folder)
                    except OSError:
                        if not folder.is_dir():  # else another process was faster, with the same content
                            raise
        finally:
            for path in staged.values():
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Let one job at a time make a thing; who waits can be cancelled."""
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while True:
                self._raise_if_cancelled()
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(_LOCK_POLL_S)
            yield
        finally:
            os.close(fd)


def _seal(folder: Path) -> None:
    """Bring a folder's files to the disk, and write down what they are."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    told = {file.relative_to(folder).as_posix(): digest_file(file) for file in files}
    atomic.write(folder / cache_limit.SEAL, json.dumps(told).encode())


def _sealed(folder: Path) -> bool:
    """Whether a folder's files are what they were when it was sealed."""
    try:
        told = json.loads((folder / cache_limit.SEAL).read_bytes())
        return bool(all(digest_file(folder / name) == digest for name, digest in told.items()))
    except (OSError, ValueError, AttributeError):
        return False


def content_key(*parts: Any) -> str:
    """The sha256 of parts that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
