"""Stage 2, compile: the child's end of the JSON contract. Receives a request file, hands on progress and one result as lines.

The request is ``{"action": ..., ...}``. Lines on the original standard output are ``{"progress": [what, done, total]}``, then
one of ``{"result": {...}}`` or ``{"error": {"code", "message", "hint"}}``. Everything that libraries print goes to the log.
Memory or disk that runs out is told as that. Any other exception that is no :class:`Refused` is a broken toolchain: its traceback is in
the log and the process exits with 1.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from typing import Any

_ROOM = "make room on this machine, or let another builder compile this class"

Request = dict[str, Any]
Progress = Callable[[str, int, int], None]
Action = Callable[[Request, Progress], dict[str, Any]]


class Refused(Exception):
    """The input's fault, told to the user: ``code`` is one of :mod:`edgefleet_shared.errors`."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.fields = {"code": code, "message": message, "hint": hint}


def need_room(folder: str, wanted_bytes: int) -> None:
    """Before a library writes that does not look whether it could: what it cut off would be read as a broken file.

    Raises:
        OSError: there is not that much.
    """
    found = os.statvfs(folder)
    if found.f_bavail * found.f_frsize < wanted_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)


def serve(actions: dict[str, Action]) -> None:
    """Run the one action of the request whose path is the last argument."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # native libraries print to descriptor 1, past sys.stdout
    sys.stdout = sys.stderr

    def say(kind: str, value: Any) -> None:
        lines.write(json.dumps({kind: value}) + "\n")

    with open(sys.argv[-1], encoding="utf-8") as stream:
        request = json.load(stream)
    try:
        say("result", actions[request["action"]](request, lambda *step: say("progress", step)))
    except Refused as exc:
        say("error", exc.fields)
    except MemoryError as exc:
        say(
            "error",
            {"code": "environment", "message": f"out of memory in the step {request['action']}: {exc}", "hint": _ROOM},
        )
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = exc.filename or request["action"]
        say("error", {"code": "environment", "message": f"the disk is full: {where} can't be written", "hint": _ROOM})
