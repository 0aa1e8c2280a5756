"""Stage 2, compile: vendors' programs, seen from a child. Receives a command line, hands on what it printed, or what it refused.

The parent has looked for the program already (:mod:`edgefleet_controller.compile.tools`); it ends with the child (:mod:`edgefleet_controller.compile.guard`).
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from . import job

MAX_SAID = 400  # characters of a program's reason that go into a message; the log has all
KEPT_BYTES = 1 << 20  # of what it printed, from its beginning, and as many from its end


def call(command: Sequence[str], folder: str) -> tuple[int, str]:
    """Run a program in a folder; returns its exit status and what it printed (both streams), of very much the beginning and the end. The log
    gets it all, as it comes: of a program that never ends it says how far that got.

    Raises:
        Refused: it can't be started.
    """
    sys.stderr.write(f"$ {' '.join(command)}\n")
    sys.stderr.flush()
    try:
        process = subprocess.Popen(
            list(command), cwd=folder, env=os.environ | json.loads(os.environ.get("EDGEFLEET_VENDORS_VARIABLES", "{}")),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as exc:
        reason = "not found" if exc.errno == errno.ENOENT else exc.strerror
        raise job.Refused("toolchain_failed", f"{command[0]} can't be started: {reason}") from exc
    with process:
        assert process.stdout is not None
        first, last = b"", b""
        while piece := os.read(process.stdout.fileno(), 65536):
            sys.stderr.buffer.write(piece)
            sys.stderr.flush()
            room = KEPT_BYTES - len(first)
            first, last = first + piece[:room], (last + piece[room:])[-KEPT_BYTES:]
    return process.returncode, (first + last).decode(errors="replace")


def failed(program: str, code: int, said: str) -> job.Refused:
    """The refusal for a program that ended badly: with its first line that speaks of an error, else its last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    reason = (errors or lines[-1:] or ["it printed nothing"])[0]
    how = f"signal {-code}" if code < 0 else f"status {code}"
    return job.Refused("toolchain_failed", f"{program} ended with {how}: {reason[:MAX_SAID]}")
