"""What runs in a toolchain: children that misbehave, what they start, and workers that die over them. A target's own file, run as any child is."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from edgefleet_controller.compile import watching
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.compile.watching import Cancelled, ChildDied, ChildKilled
from edgefleet_shared.errors import EnvironmentProblem, ModelError, ToolchainError
from support import control_group
from support.processes import alive, assert_ends
from support.toolchains import TINY


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the tiny toolchain in it."""
    cache = tmp_path_factory.mktemp("pristine")
    Toolchains(cache).ensure(TINY)
    return cache


CHILD = """
import os, sys, time
def action(request, progress):
    progress("working", 1, 2)
    BODY
def main():
    from children import job
    job.serve({"try": action})
"""


def child(cache: Path, tmp_path: Path, body: str, *, limit_s: float = 30.0, **more: Any) -> dict[str, Any]:
    file = tmp_path / "target.py"
    file.write_text(CHILD.replace("BODY", body.replace("\n", "\n    ")))
    toolchains = Toolchains(cache, cancel=more.pop("cancel", None))
    return toolchains.run(
        toolchains.ensure(TINY),
        str(file),
        {"action": "try"},
        tmp_path / "work",
        tmp_path / "child.log",
        limit_s=limit_s,
        **more,
    )


def test_a_child_answers_reports_and_its_noise_goes_to_the_log(pristine: Path, tmp_path: Path) -> None:
    told: list[Any] = []
    found = child(
        pristine,
        tmp_path,
        "print('noise')\nos.write(1, b'\\xff native noise\\n')\nreturn {'x': 1}",
        progress=lambda *s: told.append(s),
    )
    assert found == {"x": 1}
    assert told == [("working", 1, 2)]
    assert b"noise\n" in (tmp_path / "child.log").read_bytes()
    assert b"\xff native noise" in (tmp_path / "child.log").read_bytes()


@pytest.mark.parametrize(
    ("body", "error", "told"),
    [
        ("raise MemoryError('3 GB')", EnvironmentProblem, "out of memory in the step try: 3 GB"),
        ("raise OSError(28, 'No space left on device', '/cache/x')", EnvironmentProblem, "the disk is full: /cache/x can't be written"),
        ("from children import job\nraise job.Refused('bad_model', 'no operator Det')", ModelError, "no operator Det"),
        ("raise ValueError('odd')", ToolchainError, r"tiny try failed: ValueError: odd \(see .*child.log\)"),
        ("import numpy_that_is_gone", ToolchainError, r"No module named 'numpy_that_is_gone'; its environment seems damaged \(fleet toolchain check tiny"),
        ("os.kill(os.getpid(), 11)", ChildDied, "the tiny try process died: SIGSEGV"),
        ("os.kill(os.getpid(), 9)", ChildKilled, "SIGKILL, as when this machine runs out of memory"),
        ("os.kill(os.getpid(), 4)", ChildKilled, "SIGILL, as when this machine's processor lacks an instruction"),
        ("os.kill(os.getpid(), 7)", ChildKilled, "SIGBUS, as when this machine's disk can't give back"),
        ("os._exit(0)", ToolchainError, "tiny try failed: no output"),
        ("for fd in range(3, 20):\n    try: os.write(fd, b'\\xff\\x00 rubbish\\n')\n    except OSError: pass\nreturn {}", ToolchainError, "answered what is no answer: '.*rubbish"),
        ("for fd in range(3, 20):\n    try: os.write(fd, b'[1, 2]\\n')\n    except OSError: pass\nreturn {}", ToolchainError, r"answered what is no answer: '\[1, 2\]'"),
        ("time.sleep(60)", ToolchainError, "ran past its limit of 2 s and was stopped"),
        ("held = bytearray(400_000_000)\nheld[::4096] = b'x' * len(held[::4096])\ntime.sleep(60)", ChildDied, r"over its memory limit of 200000000 bytes"),
    ],
    ids=["memory", "disk", "refused", "exception", "module gone", "segfault", "killed", "illegal instruction", "bus error", "silent", "rubbish", "no object", "too long", "too large"],
)  # fmt: skip
def test_a_child_that_misbehaves_is_told_as_what_it_did(
    pristine: Path, tmp_path: Path, body: str, error: Any, told: str
) -> None:
    limit = 2.0 if "limit of 2" in told else 30.0
    with pytest.raises(error, match=told):
        child(pristine, tmp_path, body, limit_s=limit, memory_bytes=200_000_000)


def test_temporary_files_of_a_child_that_is_killed_go_with_the_jobs_folder(pristine: Path, tmp_path: Path) -> None:
    body = "import tempfile\nopen(tempfile.mkdtemp() + '/samples', 'w').close()\nos.kill(os.getpid(), 9)"
    with pytest.raises(ChildKilled):
        child(pristine, tmp_path, body)
    assert len(list((tmp_path / "work").glob("*/samples"))) == 1


def test_a_child_that_runs_out_of_a_real_disk_says_so(pristine: Path, tmp_path: Path, small_disk: Path) -> None:
    body = f"with open({str(small_disk / 'model')!r}, 'wb') as f: f.write(bytes(20_000_000))"
    with pytest.raises(EnvironmentProblem, match="the disk is full"):
        child(pristine, tmp_path, body)


def test_a_disk_that_is_too_small_for_what_a_library_will_write_is_told_before(
    pristine: Path, tmp_path: Path, small_disk: Path
) -> None:
    body = f"from children import job\njob.need_room({str(small_disk)!r}, {{}})\nreturn {{{{}}}}"
    assert child(pristine, tmp_path, body.format(1000)) == {}
    with pytest.raises(EnvironmentProblem, match=f"the disk is full: {small_disk} can't be written"):
        child(pristine, tmp_path, body.format(20_000_000))


# What a vendor's compiler does: a shell script that starts others, and one that leaves the child's group and session behind it.
STARTS = """
import subprocess
subprocess.Popen(["sh", "-c", "sh -c 'echo $$ > nested; sleep 600' & wait"])
subprocess.Popen(["sh", "-c", "setsid sh -c 'echo $$ > daemon; sleep 600' &"]).wait()
while not all(os.path.exists(name) and open(name).read() for name in ("nested", "daemon")):
    time.sleep(0.02)
"""


def assert_nothing_is_left(work: Path) -> None:
    for name in ("nested", "daemon"):
        assert_ends(int((work / name).read_text()), f"what the child had started ({name})")


@pytest.mark.parametrize("last", ["raise ValueError('odd')", "os.kill(os.getpid(), 11)", "return {}"])
def test_what_a_child_had_started_ends_with_it_however_it_ends(pristine: Path, tmp_path: Path, last: str) -> None:
    with nullcontext() if "return" in last else pytest.raises(ToolchainError):
        child(pristine, tmp_path, STARTS + last)
    assert_nothing_is_left(tmp_path / "work")


def test_a_cancelled_child_that_closed_its_output_ends_with_all_that_it_started(pristine: Path, tmp_path: Path) -> None:
    cancel = threading.Event()
    threading.Thread(target=lambda: _set_when(cancel, tmp_path / "work" / "closed"), daemon=True).start()
    with pytest.raises(Cancelled):
        child(
            pristine, tmp_path, f"{STARTS}\nos.closerange(3, 20)\nopen('closed', 'w').close()\ntime.sleep(600)", cancel=cancel, limit_s=60
        )  # fmt: skip
    assert_nothing_is_left(tmp_path / "work")


def _set_when(event: threading.Event, file: Path) -> None:
    while not file.exists():
        threading.Event().wait(0.02)
    event.set()


def test_memory_that_what_a_child_started_takes_counts(pristine: Path, tmp_path: Path) -> None:
    held = "import sys, time; held = bytearray(400_000_000); held[::4096] = b'x' * len(held[::4096]); time.sleep(60)"
    with pytest.raises(ChildDied, match="over its memory limit of 200000000 bytes"):
        child(
            pristine, tmp_path, f"import subprocess\nsubprocess.run([sys.executable, '-c', {held!r}])", memory_bytes=200_000_000
        )  # fmt: skip


def test_a_child_that_floods_its_log_is_stopped_before_the_disk_is_full(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "MAX_LOG_BYTES", 1_000_000)
    with pytest.raises(ToolchainError, match="tiny try printed more than 1 MB and was stopped"):
        child(pristine, tmp_path, "while True: sys.stderr.write('again and again\\n' * 1000)")


def test_a_vendors_program_is_heard_while_it_runs_and_of_too_many_words_the_first_and_the_last_are_kept(
    pristine: Path, tmp_path: Path
) -> None:
    script = "echo error: the reason; head -c 100000000 /dev/zero | tr '\\0' x; echo; echo the end"
    body = f"from children import vendor\ncode, said = vendor.call(['sh', '-c', {script!r}], '.')\nimport resource\n"
    body += "return {'code': code, 'said': len(said), 'first': said[:17], 'last': said[-8:], 'kb': resource.getrusage(0).ru_maxrss}"
    found = child(pristine, tmp_path, body)
    assert (found["code"], found["first"], found["last"]) == (0, "error: the reason", "the end\n")
    assert found["said"] < 5_000_000
    assert found["kb"] < 80_000
    assert (tmp_path / "child.log").stat().st_size > 100_000_000
    (tmp_path / "child.log").unlink()
    hangs = "from children import vendor\nvendor.call(['sh', '-c', 'echo optimising layer 7; sleep 600'], '.')"
    with pytest.raises(ToolchainError, match="ran past its limit of 2 s"):
        child(pristine, tmp_path, hangs, limit_s=2)
    assert "optimising layer 7" in (tmp_path / "child.log").read_text()


KILLED_WORKER = """
from pathlib import Path
from edgefleet_controller.compile.environments import Lock
from edgefleet_controller.compile.toolchains import Toolchains
here, toolchains, tiny = Path(HERE), Toolchains(Path(CACHE)), Lock(NAME, TEXT)
tell = lambda *step: print(*step, flush=True)
toolchain = toolchains.ensure(tiny, tell)
toolchains.run(toolchain, str(here / "target.py"), {"action": "try"}, here / "work", here / "child.log", limit_s=600, progress=tell)
"""


HOLDING = "held = b'x' * (220 << 20)\n"  # of a control group's 400 MiB


def worker(cache: Path, tmp_path: Path, body: str, *, before: str = "", **more: Any) -> subprocess.Popen[str]:
    """Another process that does that job."""
    (tmp_path / "target.py").write_text(CHILD.replace("BODY", body.replace("\n", "\n    ")))
    text = before + KILLED_WORKER
    for name, value in {"HERE": tmp_path, "CACHE": cache, "NAME": TINY.name, "TEXT": TINY.text}.items():
        text = text.replace(name, repr(str(value)))
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, **more)


def test_a_child_and_what_it_started_end_with_the_worker_that_was_killed(pristine: Path, tmp_path: Path) -> None:
    body = f"open('pid', 'w').write(str(os.getpid()))\n{STARTS}\nprogress('begun', 2, 2)\ntime.sleep(600)"
    process = worker(pristine, tmp_path, body)
    try:
        assert process.stdout is not None
        while "begun" not in process.stdout.readline():
            assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert_ends(int((tmp_path / "work" / "pid").read_text()), "the child, for hours and for nobody,")
    assert_nothing_is_left(tmp_path / "work")


def test_when_memory_ends_a_child_goes_before_who_started_it_and_holds_more(pristine: Path, tmp_path: Path) -> None:
    with control_group.made() as group:
        body = "held = []\nwhile True: held.append(b'x' * (1 << 20))"
        process = worker(pristine, tmp_path, body, before=HOLDING, stderr=subprocess.PIPE, preexec_fn=group.join)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1, f"ended by {process.returncode}"
    assert "SIGKILL, as when this machine runs out of memory" in said


def test_an_installation_ends_with_the_worker_that_was_killed_and_the_next_one_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:  # takes pip's question, and never answers
        with monkeypatch.context() as patch:
            patch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.getsockname()[1]}/simple")
            patch.setenv("PIP_TIMEOUT", "300")
            process = worker(tmp_path, tmp_path, "return {}")
        index.settimeout(120)
        asked, _ = index.accept()
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 10
        while running := [pid for pid in _pids() if str(tmp_path).encode() in _command(pid)]:
            assert time.monotonic() < deadline, f"{running} install on, into a folder that is another's by now"
            time.sleep(0.02)
        asked.close()
    assert Toolchains(tmp_path).ensure(TINY).packages["typing_extensions"] == "4.16.0"


def _pids() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit() and alive(int(folder.name))]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
