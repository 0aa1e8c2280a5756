"""Stage 2, compile: vendors' programs, seen from a child. Receives a command line, hands on what it printed, or what it refused.

The parent has looked for the program already (:mod:`edgefleet_controller.compile.tools`); it belongs to the child's session and ends with it.
"""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Sequence

from . import job

MAX_SAID = 400  # characters of a program's reason that go into a message; the log has all


def call(command: Sequence[str], folder: str) -> tuple[int, str]:
    """Run a program in a folder; returns its exit status and what it printed (both streams), which goes into the log too.

    Raises:
        Refused: it can't be started.
    """
    sys.stderr.write(f"$ {' '.join(command)}\n")
    try:
        ended = subprocess.run(
            list(command),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    except OSError as exc:
        reason = "not found" if exc.errno == errno.ENOENT else exc.strerror
        raise job.Refused("toolchain_failed", f"{command[0]} can't be started: {reason}") from exc
    said = ended.stdout.decode(errors="replace")
    sys.stderr.write(said)
    return ended.returncode, said


def failed(program: str, code: int, said: str) -> job.Refused:
    """The refusal for a program that ended badly: with its first line that speaks of an error, else its last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    reason = (errors or lines[-1:] or ["it printed nothing"])[0]
    how = f"signal {-code}" if code < 0 else f"status {code}"
    return job.Refused("toolchain_failed", f"{program} ended with {how}: {reason[:MAX_SAID]}")
