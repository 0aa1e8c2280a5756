"""What the agent finds out about its engines at the start, with libraries that are broken in ways that libraries are."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from edgefleet_agent import board

ENGINES = {
    "segfaults": "import ctypes; ctypes.string_at(0)",
    "hangs": "import time; time.sleep(600)",
    "hangs too": "import time; time.sleep(600)",
    "exits": "import os; os._exit(3)",
    "starts a daemon": "import os, time; os.fork() or time.sleep(90)",
    "raises": "raise EngineError('no driver here')",
    "prints": "print('{}'); print('loaded'); import sys; sys.stdout.flush()",
}
MODULE = """
from edgefleet_shared.errors import EngineError
"""
CLASS = """
class {kind}:
    name = "{name}"
    def available(self): return "9.9"
    def missing(self): return ""
    def load_library(self):
        {act}
"""


LIMIT_S, DAEMON_S = 15, 90


def kind_of(name: str) -> str:
    return name.replace(" ", "_")


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of broken libraries, installed as a distribution of its own."""
    (tmp_path / "brokenengines.py").write_text(
        MODULE + "".join(CLASS.format(kind=kind_of(name), name=name, act=act) for name, act in ENGINES.items())
    )
    info = tmp_path / "brokenengines-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brokenengines\nVersion: 1.0\n")
    lines = [f"{name} = brokenengines:{kind_of(name)}" for name in ENGINES]
    (info / "entry_points.txt").write_text("[edgefleet.engines]\n" + "\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")])))
    monkeypatch.setattr(board, "PROBE_LIMIT_S", LIMIT_S)


def test_a_library_that_dies_or_hangs_is_no_engine_and_takes_no_other_with_it(broken: None) -> None:
    begun = time.monotonic()
    found = {probe.name: probe for probe in board.probe_engines()}
    # Systemd gives the agent 90 s to start; what hangs must not add up, nor a daemon keep anybody.
    assert time.monotonic() - begun < 2 * LIMIT_S + DAEMON_S / 2, "that is the time of a daemon, or of two limits"
    assert {name: found[name].version for name in ENGINES} == {
        "segfaults": None, "hangs": None, "hangs too": None, "exits": None, "starts a daemon": "9.9", "raises": None,
        "prints": "9.9",
    }  # fmt: skip
    assert found["segfaults"].missing == "its library killed by SIGSEGV when it was loaded"
    assert found["hangs"].missing == "its library did not load within 15 s when it was loaded"
    assert found["exits"].missing == "its library ended with status 3 when it was loaded"
    assert "no driver here" in found["raises"].missing
    assert found["onnxruntime"].version
