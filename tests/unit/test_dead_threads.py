"""A controller of which a thread died ends, so that a whole one is started in its place."""

from __future__ import annotations

import subprocess
import sys

CONTROLLER = """
import threading, time
from edgefleet_controller import app
from edgefleet_shared import logs
logs.configure()
threading.excepthook = app._fatal
threading.Thread(target=lambda: [][1], name="compile-0").start()
time.sleep(60)
"""


def test_a_thread_that_dies_ends_the_controller_and_is_told_with_why() -> None:
    ended = subprocess.run([sys.executable, "-c", CONTROLLER], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 70
    assert "thread died" in ended.stderr
    assert "compile-0" in ended.stderr
    assert "IndexError" in ended.stderr
