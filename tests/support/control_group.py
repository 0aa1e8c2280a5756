"""Control groups as on a board that has no more: of memory, where the kernel chooses among the processes in it, or of tasks, where it refuses new ones."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from edgefleet_agent import out_of_memory

from support.runtimes import until

GROUPS = Path("/sys/fs/cgroup")
LIMIT_BYTES = 400 << 20
# Memory that is nobody's resident memory: the kernel has to end somebody else for it. So many MiB, or without end.
OTHERS = """
import itertools, os, sys
fd = os.memfd_create("others")
for _ in range(int(sys.argv[1])) if sys.argv[1:] else itertools.count():
    os.write(fd, bytes(1 << 20))
print("has it", flush=True)
sys.stdin.read()
"""
LEFT_MIB = 16  # of the group's memory: less than an engine takes to load


class Group:
    """A control group with so much memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take_in(self, pid: int) -> None:
        (self._folder / "cgroup.procs").write_text(str(pid))

    def fill_until(self, over: Callable[[], bool]) -> None:
        """Others in the group take memory without end until ``over``."""
        others = subprocess.Popen([sys.executable, "-c", OTHERS], stdout=subprocess.PIPE, preexec_fn=self.join)
        try:
            until(over, what="the kernel ending somebody")
        finally:
            others.kill()
            others.communicate()

    def others(self) -> subprocess.Popen[bytes]:
        """Others in the group, who hold all of its memory but a little."""
        command = [sys.executable, "-c", OTHERS, str((LIMIT_BYTES >> 20) - LEFT_MIB)]
        holding = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=self.join)
        assert holding.stdout is not None
        assert holding.stdout.readline() == b"has it\n"
        return holding

    def join(self) -> None:
        """Take in the process that calls this."""
        self.take_in(os.getpid())


class Tasks(Group):
    """A control group with so many processes and threads, which the kernel calls tasks."""

    def leave(self, spare: int) -> None:
        """Room for so many more than there are, and no others."""
        now = int((self._folder / "pids.current").read_text())
        (self._folder / "pids.max").write_text(str(now + spare))

    def open(self) -> None:
        """Room for all."""
        (self._folder / "pids.max").write_text("max")

    @contextmanager
    def around(self, *pids: int, spare: int) -> Iterator[None]:
        """These processes have room for so many more tasks than they are; let go again where they live on."""
        for pid in pids:
            self.take_in(pid)
        self.leave(spare)
        try:
            yield
        finally:
            self.open()
            for pid in (self._folder / "cgroup.procs").read_text().split():
                (self._folder.parent / "cgroup.procs").write_text(pid)


@contextmanager
def made() -> Iterator[Group]:
    """A group of :data:`LIMIT_BYTES`; empty again when it goes. The test is skipped where none can be made."""
    with _folder("memory") as folder:
        try:
            name = "memory.limit_in_bytes" if folder.parent.name == "memory" else "memory.max"
            (folder / name).write_text(str(LIMIT_BYTES))
        except OSError as exc:
            pytest.skip(f"no memory limit can be set here: {exc.strerror}")
        if not out_of_memory.kills() and "oom_kill" not in out_of_memory.VMSTAT.read_text():
            pytest.skip("this kernel does not count whom it ends")
        yield Group(folder)


@contextmanager
def made_for_tasks() -> Iterator[Tasks]:
    """A group of tasks, with room for all; empty again when it goes. The test is skipped where none can be made."""
    with _folder("pids") as folder:
        if not (folder / "pids.max").exists():
            pytest.skip("no limit of tasks can be set here")
        yield Tasks(folder)


@contextmanager
def _folder(controller: str) -> Iterator[Path]:
    """A new group, of this controller where each has groups of its own (version 1)."""
    old = GROUPS / controller
    try:
        folder = Path(tempfile.mkdtemp(prefix="edgefleet-test-", dir=old if old.is_dir() else GROUPS))
    except OSError as exc:
        pytest.skip(f"no control group can be made here: {exc.strerror}")
    try:
        yield folder
    finally:
        until(lambda: not (folder / "cgroup.procs").read_text(), what="the group being empty")
        folder.rmdir()
