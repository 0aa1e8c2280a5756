"""Toolchains: installed, examined, mended; what is said when one is broken, the disk is full, or a child misbehaves. Their locks are tiny."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from edgefleet_controller.cli import output
from edgefleet_controller.cli.main import main
from edgefleet_controller.compile import environments, inventory
from edgefleet_controller.compile.attempt import Attempt
from edgefleet_controller.compile.environments import Lock, examine, folder_of
from edgefleet_controller.compile.toolchains import Toolchain, Toolchains
from edgefleet_controller.compile.watching import Cancelled
from edgefleet_controller.compile.worker import JobRequest
from edgefleet_controller.source.importing import import_model
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import EnvironmentProblem, ToolchainError
from edgefleet_shared.work import Answer, Progress
from support.networks import classifier, device_class, project
from support.toolchains import PINNED, TINY

CACHE = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet"))


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


def test_a_toolchains_packages_are_its_locks_and_not_the_pip_that_this_python_came_with(cache: Path) -> None:
    """They go into each artifact: with a pip in it, a worker whose Python is of another patch release made another digest."""
    assert (installed(cache) / "bin" / "pip").exists()
    assert Toolchains(cache).ensure(TINY).packages == {"typing_extensions": "4.16.0"}


def test_what_lies_on_pythonpath_is_installed_all_the_same(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip skips what it sees there, and a job does not see it."""
    monkeypatch.setenv("PYTHONPATH", str(module_file(cache).parent))
    assert Toolchains(tmp_path / "fresh").ensure(TINY).packages == {"typing_extensions": "4.16.0"}


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


def test_a_disk_that_fills_up_while_installing_is_told_and_cleared(small_disk: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"the disk is full: the tiny toolchain.*EDGEFLEET_CACHE"):
        Toolchains(small_disk).ensure(TINY)
    assert not folder_of(small_disk / "toolchains", TINY).exists()


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(small_disk: Path) -> None:
    told: list[Any] = []
    with pytest.raises(EnvironmentProblem, match=r"the iree toolchain takes \d+ MB, and .* has 8 MB left"):
        Toolchains(small_disk).ensure("iree", lambda *step: told.append(step))
    assert told == []


def test_a_cache_that_can_not_be_written_is_told_by_every_command_and_by_a_compile_worker(
    small_disk: Path, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "layout")
    version = import_model(project(tmp_path, classifier()), tmp_path, layout, cache=tmp_path)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused = fleet(small_disk, "install", "tflite")
    assert refused.exit_code != 0
    assert re.search(
        rf"error: can't write {small_disk}/toolchains.*\nhint: the file system is read-only", refused.output
    )
    assert fleet(small_disk, "list").exit_code == 0
    request = JobRequest(
        layout=str(layout.root.resolve()), cache=str(small_disk), cache_limit_bytes=1 << 40, version=version.digest,
        device_class=device_class().model_dump_json(),
    )  # fmt: skip
    with Attempt(request) as attempt, pytest.raises(EnvironmentProblem, match=rf"can't write {small_disk}.*read-only"):
        attempt.run(Deaf())


class Deaf:
    """A listener that notes nothing."""

    def progress(self, step: Progress) -> None: ...

    def log(self, text: str) -> None: ...

    def measure(self, manifest: str) -> Answer:
        raise AssertionError("nobody measures here")


def test_an_installation_can_be_cancelled_and_leaves_nothing(tmp_path: Path) -> None:
    cancel = threading.Event()
    with pytest.raises(Cancelled):
        Toolchains(tmp_path, cancel=cancel).ensure(TINY, lambda *_: cancel.set())
    assert not folder_of(tmp_path / "toolchains", TINY).exists()


def test_one_that_works_is_not_lost_to_an_installation_that_fails(cache: Path) -> None:
    cancel = threading.Event()
    with pytest.raises(Cancelled):
        Toolchains(cache, cancel=cancel).ensure(TINY, lambda *_: cancel.set(), again=True)
    assert examine(cache / "toolchains", TINY).problem == ""
    Toolchains(cache).ensure(TINY, again=True)
    assert [path.name for path in (cache / "toolchains").iterdir() if path.is_dir()] == [installed(cache).name]


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
    tried = {one["target"]: one for one in found["targets"]}
    assert told.exit_code == 0
    assert "agreement" in tried["onnxruntime"]["told"]
    assert "agreement" in tried["tensorrt"]["told"]
    assert "not tried: atc is not on PATH" in tried["acl"]["told"]


def test_check_finds_a_file_whose_bytes_changed_at_the_same_size(tmp_path: Path) -> None:
    lock = environments.lock_named("onnxruntime")
    Toolchains(CACHE).ensure(lock)
    copy = folder_of(tmp_path / "toolchains", lock)
    shutil.copytree(folder_of(CACHE / "toolchains", lock), copy, symlinks=True, copy_function=os.link)
    (checker,) = copy.glob("lib/python*/site-packages/onnx/checker.py")
    content = checker.read_bytes()
    checker.unlink()  # the real one is a link to the same file
    checker.write_bytes(content.replace(b"import", b"1mport"))
    told = fleet(tmp_path, "check", "onnxruntime")
    assert told.exit_code == 1
    assert "BAD  onnxruntime: the file onnx/checker.py has other bytes than were installed; mend it:" in told.output


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
    tried = inventory.try_out(Toolchains(tmp_path), target, lambda *_: None)
    assert "the library is of another age" in tried.problem
    (log,) = (tmp_path / "tried").glob("onnxruntime-*/logs/*-measure.log")
    assert str(log) in tried.problem
