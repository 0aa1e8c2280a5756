"""The kernel's own choice when memory ends, in a control group of its own: what had taken no more than it may is not blamed for the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from edgefleet_agent import out_of_memory, sandbox
from edgefleet_agent.sandbox import Ended, Limits
from support.runtimes import Load, running, until

GROUPS = Path("/sys/fs/cgroup")
LIMIT_BYTES = 400 << 20
# Memory that is nobody's resident memory: the kernel has to end somebody else for it.
OTHERS = """
import os, sys
fd = os.memfd_create("others")
print("began", flush=True)
while True:
    os.write(fd, bytes(1 << 20))
"""


class Group:
    """A control group with so much memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take_in(self, pid: int) -> None:
        (self._folder / "cgroup.procs").write_text(str(pid))

    def fill_until(self, over: Callable[[], bool]) -> None:
        """Others in the group take memory without end until ``over``."""
        others = subprocess.Popen([sys.executable, "-c", OTHERS], stdout=subprocess.PIPE, preexec_fn=self._join)
        try:
            until(over, what="the kernel ending somebody")
        finally:
            others.kill()
            others.communicate()

    def _join(self) -> None:
        self.take_in(os.getpid())


@pytest.fixture
def group() -> Iterator[Group]:
    old = (GROUPS / "memory").is_dir()
    folder = (GROUPS / "memory" if old else GROUPS) / f"edgefleet-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as exc:
        pytest.skip(f"no control group can be made here: {exc.strerror}")
    try:
        try:
            (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(LIMIT_BYTES))
        except OSError as exc:
            pytest.skip(f"no memory limit can be set here: {exc.strerror}")
        if not out_of_memory.kills() and "oom_kill" not in out_of_memory.VMSTAT.read_text():
            pytest.skip("this kernel does not count whom it ends")
        yield Group(folder)
    finally:
        until(lambda: not (folder / "cgroup.procs").read_text(), what="the group being empty")
        folder.rmdir()


def test_a_worker_that_has_to_go_for_others_is_not_counted_as_crashed_and_comes_back(
    group: Group, tmp_path: Path
) -> None:
    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1"))
        runtime.start()
        first = runtime.version("1")
        group.take_in(first.pid)
        with Load(runtime) as load:
            group.fill_until(lambda: runtime.version("1").starved == 1)
            until(lambda: runtime.version("1").state == "ready", what="the worker being back")
            load.seen("1")
        assert load.failed == []
        after = runtime.version("1")
        assert (after.crashes, after.starved) == (0, 1)
        assert "killed by SIGKILL: the board is out of memory; it held" in after.last_problem
        assert b'edgefleet_runtime_starved_total{model="toy",version="1"} 1\n' in runtime.get("/metrics")[1]
        assert runtime.infer(np.full((1, 8, 8, 3), 0.5, np.float32))[0] == 200


def test_a_worker_that_is_killed_while_nobody_lacks_memory_has_crashed(tmp_path: Path) -> None:
    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1"))
        runtime.start()
        os.kill(runtime.version("1").pid, 9)
        until(lambda: runtime.version("1").crashes == 1, what="its crash being counted")
        assert runtime.version("1").starved == 0


def test_a_child_that_has_to_go_for_others_is_told_from_one_that_is_at_fault(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = str(Path(__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))
    request = json.dumps({"deed": "hang", "readable": [], "writable": [], "file_bytes": 0}).encode()
    said, ended = threading.Event(), list[Ended]()

    def tried() -> None:
        limits = Limits(memory_bytes=256 << 20, time_s=60.0)
        ended.append(sandbox.run("support.misbehaving", request, limits, lambda line: said.set()))

    trying = threading.Thread(target=tried)
    trying.start()
    assert said.wait(20)
    for child in _tried():
        group.take_in(child)
    group.fill_until(lambda: bool(ended))
    trying.join()
    assert (ended[0].problem, ended[0].starved) == ("killed by SIGKILL", True)


def _tried() -> list[int]:
    children = [int(p) for task in Path("/proc/self/task").iterdir() for p in (task / "children").read_text().split()]
    return [p for p in children if b"support.misbehaving" in Path(f"/proc/{p}/cmdline").read_bytes()]
