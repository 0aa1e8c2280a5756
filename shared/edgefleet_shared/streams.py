"""The three standard descriptors, which a program may be started without: by an init script, ``cron``, or a shell's ``<&- >&- 2>&-``.

What is opened next takes their numbers. Then a log line, or a native library's warning, goes into a lock file or a socket, and an event loop
that closes its own descriptor 0, 1 or 2 ends the process (libuv's ``uv__close`` aborts on them).
"""

from __future__ import annotations

import os
import sys


def hold() -> None:
    """Open those that are closed on /dev/null, for children too. Call it before anything else is opened."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            # For as long as the program runs; errors that can't be told must not end it.
            setattr(sys, name, open(number, "w", errors="backslashreplace", closefd=False))  # noqa: SIM115
