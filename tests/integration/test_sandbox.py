"""What native code from outside can't do: each deed runs for real in the real sandbox, and the parent tells truthfully how it ended."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from edgefleet_agent import confinement, sandbox
from edgefleet_agent.sandbox import Ended, Limits

TESTS = Path(__file__).parent.parent
MB = 1 << 20


@pytest.fixture
def misbehave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    outside, inside, scratch = tmp_path / "secret", tmp_path / "artifact", tmp_path / "scratch"
    outside.write_text("key")
    inside.write_text("model")
    scratch.mkdir()
    (scratch / "kept").write_text("kept")

    def run(
        deed: str,
        memory_bytes: int = 256 * MB,
        time_s: float = 20.0,
        user: int = 0,
        on_report: Callable[[bytes], None] | None = None,
    ) -> Ended:
        request = {
            "deed": deed, "readable": [str(inside)], "writable": [str(scratch)], "file_bytes": 8 * MB,
            "outside": str(outside), "inside": str(inside), "scratch": str(scratch),
            "user": user,
        }  # fmt: skip
        limits = Limits(memory_bytes=memory_bytes, time_s=time_s)
        return sandbox.run("support.misbehaving", json.dumps(request).encode(), limits, on_report)

    return run


def reports(ended: Ended) -> list[str]:
    return [json.loads(line) for line in ended.reports]


@pytest.mark.parametrize(
    ("deed", "problem"),
    [("segfault", "killed by SIGSEGV"), ("illegal_instruction", "killed by SIGILL"), ("abort", "killed by SIGABRT")],
)
def test_a_child_that_dies_is_told_by_its_signal(misbehave, deed: str, problem: str) -> None:
    ended = misbehave(deed)
    assert ended.problem == problem
    assert not ended.over_limit
    assert "survived" not in reports(ended)


def test_what_a_child_may_read_of_the_kernel_it_may_read_after_that_has_dropped_its_caches(
    misbehave, tmp_path: Path
) -> None:
    """As it does by itself where memory is short or many files are looked at: procfs then makes what Landlock's rules are about anew."""
    if not os.access("/proc/sys/vm/drop_caches", os.W_OK):
        pytest.skip("the kernel can't be told to drop its caches here")

    def drop(report: bytes) -> None:
        if json.loads(report) == "confined":
            Path("/proc/sys/vm/drop_caches").write_text("2")
            (tmp_path / "artifact").write_text("look")

    _, _, *looked, _ = reports(misbehave("look_around", on_report=drop))
    assert looked == [
        f"{path}: done"
        for path in ("/proc/self/statm", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/self/task")
    ]


def test_a_child_that_hangs_and_ignores_signals_is_ended_at_its_time_limit(misbehave) -> None:
    began = time.monotonic()
    ended = misbehave("hang", time_s=1.5)
    assert ended.problem == "over its time limit of 1.5 s"
    assert ended.waited_share is not None
    assert ended.over_limit
    assert time.monotonic() - began < 10


def test_a_child_that_eats_memory_is_ended_at_its_memory_limit(misbehave) -> None:
    ended = misbehave("eat_memory", memory_bytes=128 * MB)
    assert ended.problem == f"over its memory limit of {128 * MB} bytes"
    assert 128 * MB <= ended.peak_memory_bytes < 1024 * MB


def test_a_child_is_what_the_kernel_ends_first_when_the_board_is_out_of_memory(misbehave) -> None:
    place, left, _ = reports(misbehave("tell_place"))[1:]
    assert place == "1000"
    assert left == "leave it: PermissionError"


def test_a_single_huge_allocation_is_refused_before_any_page_is_touched(misbehave) -> None:
    said = reports(misbehave("reserve_memory"))
    assert "small: done" in said
    assert "large: MemoryError" in said


@pytest.mark.parametrize(("limited", "refused"), [("RLIMIT_AS", "False"), ("RLIMIT_DATA", "True")])
def test_memory_that_its_own_limit_keeps_from_a_process_is_not_refused_by_the_board(limited: str, refused: str) -> None:
    code = (
        "import resource; from edgefleet_agent import confinement;"
        f"resource.setrlimit(resource.{limited}, (256 << 20, 256 << 20));"
        "print(confinement.is_refused_memory(100 << 20), confinement.is_refused_memory(1 << 30))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["False", refused]


def test_a_child_that_floods_its_parent_is_ended(misbehave) -> None:
    ended = misbehave("flood")
    assert "report limit" in ended.problem
    assert ended.over_limit


@pytest.mark.skipif(os.getuid() != 0, reason="giving rights up needs root")
def test_a_child_that_starts_threads_without_end_is_refused_them(misbehave) -> None:
    said = reports(misbehave("many_threads", user=65533))
    assert said[0] == "missing []"
    assert "refused" in said
    assert said[-1] == "survived"
    assert 500 < int(said[-2].split()[0]) < 1100


def test_a_confined_child_reaches_no_network_process_or_file_and_keeps_what_it_needs(misbehave) -> None:
    if platform.machine() not in ("x86_64", "aarch64", "armv7l"):
        pytest.skip(f"no seccomp filter for {platform.machine()}")
    ended = misbehave("escape")
    said = reports(ended)
    assert said[0] == "missing []", "this kernel lacks a layer, so this test can't prove it"
    assert ended.problem == ""
    assert said[-1] == "survived"
    outcome = dict(line.split(": ", 1) for line in said[1:-1])
    allowed = {"read artifact", "write scratch", "thread", "limit itself", "pin itself", "name itself"}
    allowed |= {"empty a file by writing"}
    for deed in allowed:
        assert outcome[deed] == "done", deed
    refused = set(outcome) - allowed
    assert len(refused) == 31
    for deed in refused:
        assert outcome[deed] != "done", f"the sandbox let it: {deed}"
    # Whatever else would have been in the way: the filter was.
    for deed in ("cut a file by its name", "type at the terminal"):
        assert outcome[deed] == "PermissionError", deed


def test_nothing_of_an_escape_is_left_behind(misbehave, tmp_path: Path) -> None:
    misbehave("escape")
    assert (tmp_path / "artifact").read_text() == "model"
    assert not (tmp_path / "secret.new").exists()
    assert (tmp_path / "scratch" / "large").stat().st_size <= 8 * MB


def test_a_module_that_does_not_exist_is_told_with_its_last_words() -> None:
    ended = sandbox.run("edgefleet_agent.no_such_module", b"", Limits(memory_bytes=256 * MB, time_s=10))
    assert ended.problem == "ended with status 1"
    assert "no_such_module" in ended.output


def test_the_parent_keeps_no_descriptor_and_no_child(misbehave) -> None:
    misbehave("abort")
    before, children = len(os.listdir("/proc/self/fd")), children_of_this_process()
    for _ in range(3):
        misbehave("abort")
    assert len(os.listdir("/proc/self/fd")) == before
    assert children_of_this_process() == children


def children_of_this_process() -> set[str]:
    """Pids, of the dead that nobody waited for too. Other tests' libraries may keep some, such as a resource tracker."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_a_machine_without_a_filter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    with pytest.raises(OSError, match="no filter for vax"):
        confinement._seccomp(confinement.Policy())


def test_an_address_space_limit_that_is_not_kept_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an emulator does: it takes the limit and gives back another."""
    monkeypatch.setattr(resource, "setrlimit", lambda _which, _limits: None)
    (told,) = confinement.limit_address_space(123 << 20)
    assert told.startswith("address space: a limit of")
