"""Toolchains: installed, examined, mended; what is said when one is broken, the disk is full, or a child misbehaves. Their locks are tiny."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from edgefleet_controller.cli import output
from edgefleet_controller.cli.main import main
from edgefleet_controller.compile import environments, inventory, watching
from edgefleet_controller.compile.environments import Lock, examine, folder_of
from edgefleet_controller.compile.toolchains import Toolchain, Toolchains
from edgefleet_controller.compile.watching import Cancelled, ChildDied
from edgefleet_shared.errors import EnvironmentProblem, ModelError, ToolchainError
from support.processes import alive, assert_ends

CACHE = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))
PINNED = (
    "typing-extensions==4.16.0 --hash=sha256:481caa481374e813c1b176ada14e97f1f67a4539ce9cfeb3f350d78d6370c2e8"
    " --hash=sha256:dc983d19a509c94dba722ee6abd33940f7c05a89e243c47e907eb4db6f1a43e5\n"
)
TINY = Lock("tiny", PINNED)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the tiny toolchain in it."""
    cache = tmp_path_factory.mktemp("pristine")
    Toolchains(cache).ensure(TINY)
    return cache


@pytest.fixture
def cache(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(pristine, tmp_path / "cache", symlinks=True)
    return tmp_path / "cache"


def installed(cache: Path) -> Path:
    return folder_of(cache / "toolchains", TINY)


def module_file(cache: Path) -> Path:
    (found,) = installed(cache).glob("lib/python*/site-packages/typing_extensions.py")
    return found


def test_a_fresh_one_is_whole_and_its_installation_told_its_progress(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    toolchain = Toolchains(tmp_path).ensure(TINY, lambda *step: told.append(step))
    assert toolchain.packages["typing_extensions"] == "4.16.0"
    assert told[0] == ("installing the tiny toolchain", 0, 1)
    assert any(
        re.match("installing the tiny toolchain: typing.extensions", what) and done == 1 for what, done, _ in told
    )
    state = examine(tmp_path / "toolchains", TINY)
    assert (state.installed, state.problem) == (True, "")
    assert state.size_bytes > 1_000_000
    assert not list((tmp_path / "toolchains").glob(".*/"))


def test_what_a_lock_pins_by_version_only_is_installed_too(tmp_path: Path) -> None:
    lock = Lock("tiny", f"{PINNED}{environments.BY_VERSION} mpmath==1.3.0\n")
    assert lock.count == 2
    assert Toolchains(tmp_path).ensure(lock).packages["mpmath"] == "1.3.0"


def _no_marker(cache: Path) -> None:
    (installed(cache) / environments.MARKER).unlink()


def _no_file(cache: Path) -> None:
    module_file(cache).unlink()


def _other_file(cache: Path) -> None:
    module_file(cache).write_text("")


def _no_package(cache: Path) -> None:
    shutil.rmtree(next(module_file(cache).parent.glob("typing_extensions-*.dist-info")))


def _other_version(cache: Path) -> None:
    metadata = next(module_file(cache).parent.glob("typing_extensions-*.dist-info"))
    metadata.rename(metadata.with_name("typing_extensions-4.1.0.dist-info"))


def _no_python(cache: Path) -> None:
    (installed(cache) / "bin" / "python").unlink()


DAMAGE = {
    _no_marker: "half installed",
    _no_file: "the file typing_extensions.py is gone",
    _other_file: r"the file typing_extensions.py has 0 bytes, not \d+",
    _no_package: "the package typing_extensions is gone",
    _other_version: r"the package typing_extensions has version 4\.1\.0, not 4\.16\.0 as its lock says",
    _no_python: "its Python is gone",
}


@pytest.mark.parametrize("harm", DAMAGE, ids=lambda harm: harm.__name__.strip("_"))
def test_damage_is_found_and_told(cache: Path, harm: Any) -> None:
    harm(cache)
    state = examine(cache / "toolchains", TINY)
    assert re.search(DAMAGE[harm], state.problem), state.problem


@pytest.mark.parametrize("harm", [_no_package, _other_version, _no_python])
def test_a_broken_one_is_refused_with_how_to_mend_it_and_again_mends_it(cache: Path, harm: Any) -> None:
    harm(cache)
    with pytest.raises(ToolchainError, match=r"the tiny toolchain is broken: .*fleet toolchain install tiny --again"):
        Toolchains(cache).ensure(TINY)
    Toolchains(cache).ensure(TINY, again=True)
    assert examine(cache / "toolchains", TINY).problem == ""


def test_a_half_installed_one_is_installed_anew_at_its_next_use(cache: Path) -> None:
    _no_marker(cache)
    (installed(cache) / "left-over").write_text("of an installation that was cut")
    assert Toolchains(cache).ensure(TINY).packages["typing_extensions"] == "4.16.0"
    assert not (installed(cache) / "left-over").exists()


def test_a_wrong_hash_is_told_in_pips_words_and_leaves_only_the_log(tmp_path: Path) -> None:
    bad = Lock("bad", "typing-extensions==4.16.0 --hash=sha256:" + "0" * 64 + "\n")
    with pytest.raises(
        ToolchainError, match=r"can't install the bad toolchain: THESE PACKAGES DO NOT MATCH THE HASHES"
    ):
        Toolchains(tmp_path).ensure(bad)
    left = [path for path in (tmp_path / "toolchains").iterdir() if not path.name.startswith(".")]
    assert [path.suffix for path in left] == [".log"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_while_installing_is_told_and_cleared(small_disk: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"the disk is full: the tiny toolchain.*EDGEFLEET_CACHE"):
        Toolchains(small_disk).ensure(TINY)
    assert not folder_of(small_disk / "toolchains", TINY).exists()


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(small_disk: Path) -> None:
    told: list[Any] = []
    with pytest.raises(EnvironmentProblem, match=r"the iree toolchain takes \d+ MB, and .* has 8 MB left"):
        Toolchains(small_disk).ensure("iree", lambda *step: told.append(step))
    assert told == []


def test_an_installation_can_be_cancelled_and_leaves_nothing(tmp_path: Path) -> None:
    cancel = threading.Event()
    with pytest.raises(Cancelled):
        Toolchains(tmp_path, cancel=cancel).ensure(TINY, lambda *_: cancel.set())
    assert not folder_of(tmp_path / "toolchains", TINY).exists()


def test_whoever_waits_for_another_installation_can_be_cancelled(tmp_path: Path) -> None:
    began, cancel = threading.Event(), threading.Event()
    done: list[Toolchain] = []

    def first(what: str, _done: int, _total: int) -> None:
        began.set()
        assert waited.wait(60)

    waited = threading.Event()
    thread = threading.Thread(target=lambda: done.append(Toolchains(tmp_path).ensure(TINY, first)))
    thread.start()
    assert began.wait(60)

    def second(what: str, _done: int, _total: int) -> None:
        assert "waiting for another program" in what
        cancel.set()

    with pytest.raises(Cancelled, match="while another program installed the tiny toolchain"):
        Toolchains(tmp_path, cancel=cancel).ensure(TINY, second)
    waited.set()
    thread.join(120)
    assert done[0].packages["typing_extensions"] == "4.16.0"


# --- children that misbehave: a target's own file, run as any child is ---------------------------------------------------


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
        ("os.kill(os.getpid(), 9)", ChildDied, "SIGKILL, as when this machine runs out of memory"),
        ("os._exit(0)", ToolchainError, "tiny try failed: no output"),
        ("for fd in range(3, 20):\n    try: os.write(fd, b'\\xff\\x00 rubbish\\n')\n    except OSError: pass\nreturn {}", ToolchainError, "answered what is no answer: '.*rubbish"),
        ("for fd in range(3, 20):\n    try: os.write(fd, b'[1, 2]\\n')\n    except OSError: pass\nreturn {}", ToolchainError, r"answered what is no answer: '\[1, 2\]'"),
        ("time.sleep(60)", ToolchainError, "ran past its limit of 2 s and was stopped"),
        ("held = bytearray(400_000_000)\nheld[::4096] = b'x' * len(held[::4096])\ntime.sleep(60)", ChildDied, r"over its memory limit of 200000000 bytes"),
    ],
    ids=["memory", "disk", "refused", "exception", "module gone", "segfault", "killed", "silent", "rubbish", "no object", "too long", "too large"],
)  # fmt: skip
def test_a_child_that_misbehaves_is_told_as_what_it_did(
    pristine: Path, tmp_path: Path, body: str, error: Any, told: str
) -> None:
    limit = 2.0 if "limit of 2" in told else 30.0
    with pytest.raises(error, match=told):
        child(pristine, tmp_path, body, limit_s=limit, memory_bytes=200_000_000)


def test_a_child_that_runs_out_of_a_real_disk_says_so(pristine: Path, tmp_path: Path, small_disk: Path) -> None:
    body = f"with open({str(small_disk / 'model')!r}, 'wb') as f: f.write(bytes(20_000_000))"
    with pytest.raises(EnvironmentProblem, match="the disk is full"):
        child(pristine, tmp_path, body)


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


def worker(cache: Path, tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """Another process that does that job."""
    (tmp_path / "target.py").write_text(CHILD.replace("BODY", body.replace("\n", "\n    ")))
    text = KILLED_WORKER
    for name, value in {"HERE": tmp_path, "CACHE": cache, "NAME": TINY.name, "TEXT": TINY.text}.items():
        text = text.replace(name, repr(str(value)))
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)


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


# --- the command line ------------------------------------------------------------------------------------------------------


def fleet(cache: Path, *arguments: str) -> Any:
    environment = {"EDGEFLEET_CACHE": str(cache), "EDGEFLEET_HOME": str(cache / "home")}
    output.console.width = 250  # it looked for COLUMNS when it was made; whoever runs the tests may have set that
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return CliRunner().invoke(main, ["toolchain", *arguments], env=environment, catch_exceptions=False)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_list_shows_every_toolchain_with_its_targets_and_the_vendors_programs(tmp_path: Path) -> None:
    told = json.loads(fleet(tmp_path, "list", "--json").stdout)
    by_name = {one["name"]: one for one in told["toolchains"]}
    assert {"onnxruntime", "tflite", "openvino", "iree", "rknn", "tensorrt-rtx"} <= set(by_name)
    assert by_name["tflite"]["targets"] == ["coral", "tflite"]
    assert by_name["iree"]["problem"] == "not installed"
    assert all(one["needs_bytes"] > 0 for one in by_name.values())
    assert (by_name["keras"]["targets"], by_name["pruning"]["targets"]) == ([], [])
    assert "TensorFlow's own converter" in by_name["keras"]["use"]
    programs = {one["name"]: one for one in told["programs"]}
    assert "coral.ai" in programs["edgetpu_compiler"]["problem"]
    assert "not installed" in fleet(tmp_path, "list").stdout


def test_check_of_one_that_is_not_installed_or_not_known_says_so(tmp_path: Path) -> None:
    missing = fleet(tmp_path, "check", "iree")
    assert missing.exit_code == 1
    assert "the iree toolchain is not installed" in missing.output
    assert "fleet toolchain install iree" in missing.output
    unknown = fleet(tmp_path, "install", "abacus")
    assert unknown.exit_code == 1
    assert "no toolchain 'abacus'; there are: " in unknown.output
    assert "no toolchain is installed" in fleet(tmp_path, "check").output


def test_check_compiles_by_every_target_and_a_damaged_one_fails_it() -> None:
    toolchains = Toolchains(CACHE)
    toolchains.ensure("onnxruntime")
    told = fleet(CACHE, "check", "onnxruntime", "--json")
    (found,) = json.loads(told.stdout)
    trials = {trial["target"]: trial for trial in found["trials"]}
    assert told.exit_code == 0
    assert "agreement" in trials["onnxruntime"]["told"]
    assert "agreement" in trials["tensorrt"]["told"]
    assert "not tried: atc is not on PATH" in trials["acl"]["told"]


def test_check_fails_where_a_file_is_gone(tmp_path: Path) -> None:
    """On a toolchain's folder that links to the real one's files, less one."""
    lock = environments.lock_named("onnxruntime")
    whole = folder_of(CACHE / "toolchains", lock)
    Toolchains(CACHE).ensure(lock)
    copy = folder_of(tmp_path / "toolchains", lock)
    shutil.copytree(whole, copy, symlinks=True, copy_function=os.link)
    next(copy.glob("lib/python*/site-packages/onnx/checker.py")).unlink()
    told = fleet(tmp_path, "check", "onnxruntime")
    assert told.exit_code == 1
    assert (
        "BAD  onnxruntime: the file onnx/checker.py is gone; mend it: fleet toolchain install onnxruntime --again"
        in told.output
    )


def test_a_target_that_fails_on_trial_keeps_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (target,) = [one for one in inventory.targets_of("onnxruntime") if one.name == "onnxruntime"]
    monkeypatch.setattr(type(target), "module", str(tmp_path / "broken.py"))
    (tmp_path / "broken.py").write_text("def main():\n    raise SystemError('the library is of another age')\n")
    (tmp_path / "toolchains").symlink_to(CACHE / "toolchains")
    trial = inventory.try_out(Toolchains(tmp_path), target, lambda *_: None)
    assert "the library is of another age" in trial.problem
    (log,) = (tmp_path / "tried").glob("onnxruntime-*/logs/*-measure.log")
    assert str(log) in trial.problem
