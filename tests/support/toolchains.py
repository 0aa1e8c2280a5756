"""The smallest toolchain that there is: one package of one file."""

from __future__ import annotations

from edgefleet_controller.compile.environments import Lock

PINNED = (
    "typing-extensions==4.16.0 --hash=sha256:481caa481374e813c1b176ada14e97f1f67a4539ce9cfeb3f350d78d6370c2e8"
    " --hash=sha256:dc983d19a509c94dba722ee6abd33940f7c05a89e243c47e907eb4db6f1a43e5\n"
)
TINY = Lock("tiny", PINNED)
