"""What the agent finds out about its engines at the start, with libraries that are broken in ways that libraries are."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgefleet_agent import board

ENGINES = {
    "segfaults": "import ctypes; ctypes.string_at(0)",
    "hangs": "import time; time.sleep(600)",
    "exits": "import os; os._exit(3)",
    "raises": "raise EngineError('no driver here')",
    "prints": "print('{}'); print('loaded'); import sys; sys.stdout.flush()",
}
MODULE = """
from edgefleet_shared.errors import EngineError
"""
CLASS = """
class {name}:
    name = "{name}"
    def available(self): return "9.9"
    def missing(self): return ""
    def load_library(self):
        {act}
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of broken libraries, installed as a distribution of its own."""
    (tmp_path / "brokenengines.py").write_text(
        MODULE + "".join(CLASS.format(name=name, act=act) for name, act in ENGINES.items())
    )
    info = tmp_path / "brokenengines-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brokenengines\nVersion: 1.0\n")
    lines = [f"{name} = brokenengines:{name}" for name in ENGINES]
    (info / "entry_points.txt").write_text("[edgefleet.engines]\n" + "\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(board, "PROBE_LIMIT_S", 8)


def test_a_library_that_dies_or_hangs_is_no_engine_and_takes_no_other_with_it(broken: None) -> None:
    found = {probe.name: probe for probe in board.probe_engines()}
    assert {name: found[name].version for name in ENGINES} == {
        "segfaults": None, "hangs": None, "exits": None, "raises": None, "prints": "9.9",
    }  # fmt: skip
    assert found["segfaults"].missing == "its library killed by SIGSEGV when it was loaded"
    assert found["hangs"].missing == "its library did not load within 8 s when it was loaded"
    assert found["exits"].missing == "its library ended with status 3 when it was loaded"
    assert "no driver here" in found["raises"].missing
    assert found["onnxruntime"].version
