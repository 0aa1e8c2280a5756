"""What the repository itself must hold: nothing secret, nothing of one machine, a light board, a Makefile that explains itself."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What a board must never have to install: web framework, database, compiler, test tools.
NOT_ON_A_BOARD = {
    "fastapi", "starlette", "uvicorn", "pydantic", "sqlmodel", "sqlalchemy", "psycopg", "httpx", "rich", "onnx", "nncf",
    "torch", "iree-base-compiler", "tensorflow", "tensorflow-cpu", "ai-edge-quantizer", "litert-torch", "onnx2torch", "scipy", "pillow", "pytest",
    "mypy", "ruff", "hatchling", "edgefleet-controller",
}  # fmt: skip
ENGINES = {"onnxruntime", "ai-edge-litert", "openvino", "iree-base-runtime", "ncnn"}


def tracked() -> list[Path]:
    """Every file that git tracks, or would (new and not ignored)."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
        timeout=60,
    )
    paths = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    return [path for path in paths if path.is_file()]


def pinned(lock: Path) -> set[str]:
    """The packages that a lock names."""
    return set(re.findall(r"^([a-z0-9._-]+)==", lock.read_text(), flags=re.M))


def offenders(pattern: bytes) -> list[str]:
    found = re.compile(pattern)
    this = Path(__file__).resolve()
    return [str(p.relative_to(ROOT)) for p in tracked() if p != this and found.search(p.read_bytes())]


LOCKS = sorted(ROOT.glob("requirements/*.txt"))
BOARD_LOCKS = sorted(ROOT.glob("requirements/agent*.txt"))


def test_the_top_level_is_as_the_design_says():
    for name in ("controller", "agent", "shared", "manifests", "tests", "benchmarks", "docs", "requirements"):
        assert (ROOT / name).is_dir(), name
    for name in (
        "docker-compose.yml", "pyproject.toml", "Makefile", ".ci/run", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"
    ):  # fmt: skip
        assert (ROOT / name).is_file(), name


def test_the_licence_is_apache_2_and_every_distribution_says_so():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
    for distribution in ("shared", "agent", "controller"):
        assert 'license = "Apache-2.0"' in (ROOT / distribution / "pyproject.toml").read_text()


def test_no_private_key_is_in_git():
    assert offenders(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s*[A-Za-z0-9+/]{20}") == []


def test_no_path_of_one_machine_is_in_git():
    assert offenders(rb"(?<![\w.])/(?:home|Users|root|work)/[A-Za-z0-9._-]+/") == []


def test_no_file_is_larger_than_a_megabyte():
    assert [str(p.relative_to(ROOT)) for p in tracked() if p.stat().st_size > 1_000_000] == []


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_a_lock_pins_every_package_with_hashes_and_names_no_address(lock):
    text = lock.read_text()
    assert "://" not in text
    assert not re.search(r"^\s*--(?:index|extra-index|find-links|trusted-host)", text, flags=re.M)
    entries = [entry for entry in re.split(r"\n(?=\S)", text.strip()) if not entry.startswith("#")]
    assert entries
    for entry in entries:
        assert re.match(r"[a-z0-9._-]+==\S+", entry), entry[:80]
        assert "--hash=sha256:" in entry, entry[:80]


def test_every_lock_has_its_source_and_every_source_its_lock():
    sources = {path.stem for path in ROOT.glob("requirements/*.in")}
    assert {path.stem for path in LOCKS} == sources


def test_what_is_shipped_is_pinned_as_it_was_tested():
    def pins(path: Path) -> set[str]:
        return set(re.findall(r"^([a-z0-9._-]+==[^\s;]+)", path.read_text(), flags=re.M))

    tested = pins(ROOT / "requirements/dev.txt")
    for lock in LOCKS:
        assert pins(lock) <= tested, lock.name


@pytest.mark.parametrize("lock", BOARD_LOCKS, ids=lambda path: path.name)
def test_a_board_installs_no_web_framework_database_or_compiler(lock):
    assert pinned(lock) & NOT_ON_A_BOARD == set()


def test_each_board_lock_has_at_most_the_one_engine_that_it_is_named_for():
    by_name = {path.stem: pinned(path) & ENGINES for path in BOARD_LOCKS}
    assert by_name == {
        "agent": set(),
        "agent-grpc": set(),
        "agent-onnxruntime": {"onnxruntime"},
        "agent-litert": {"ai-edge-litert"},
        "agent-openvino": {"openvino"},
        "agent-ncnn": {"ncnn"},
        "agent-iree": {"iree-base-runtime"},
    }


def test_every_make_target_explains_itself():
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z][a-zA-Z0-9%_-]*):(?!=)(.*)$", text, flags=re.M)
    assert len(targets) > 10
    for name, rest in targets:
        assert "## " in rest, f"make {name} has no help"
    phony = re.search(r"^\.PHONY: (.*)$", text, flags=re.M)
    assert phony is not None
    assert set(phony.group(1).split()) == {name for name, _ in targets if "%" not in name}


def test_make_alone_lists_the_targets():
    listed = subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, timeout=60
    )
    assert listed.returncode == 0, listed.stderr
    for name in ("demo", "test", "bench-%"):
        assert f"make {name} " in listed.stdout


def test_continuous_integration_runs_make_test_and_asks_nothing():
    text = (ROOT / ".ci/run").read_text()
    assert "set -euo pipefail" in text
    assert "DEBIAN_FRONTEND=noninteractive" in text
    assert re.search(r"^exec make test </dev/null$", text, flags=re.M)


def test_every_script_is_executable():
    scripts = [p for p in tracked() if p.read_bytes()[:2] == b"#!" and ".venv" not in p.parts]
    assert scripts
    assert [str(p.relative_to(ROOT)) for p in scripts if not p.stat().st_mode & 0o111] == []
