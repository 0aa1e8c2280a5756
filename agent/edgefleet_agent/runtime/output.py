"""What a worker prints: receives its stdout and stderr, hands on the end of them.

A worker writes into a pipe of its own and not where the runtime logs: it could forge lines there, fill a disk, and, where nobody reads, stop
the front with what they share. The pipe is looked into a few times a second, so that one that never stops printing waits and costs the front nothing.
"""

from __future__ import annotations

import contextlib
import os

from edgefleet_agent.sandbox import MAX_OUTPUT_BYTES, last_line

PIPE_BYTES = 64 * 1024  # what a pipe holds: pipe(7)


class Output:
    """One worker's. ``given`` is the worker's end, to be closed with :meth:`hand_over` once it has it.

    Raises:
        OSError: there is no descriptor left.
    """

    def __init__(self) -> None:
        self._read, self.given = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read, False)
        self._kept = b""

    def hand_over(self) -> None:
        os.close(self.given)

    def look(self) -> None:
        """Take what was printed. Call a few times a second."""
        if self._read >= 0:
            with contextlib.suppress(BlockingIOError):
                self._kept = (self._kept + os.read(self._read, PIPE_BYTES))[-MAX_OUTPUT_BYTES:]

    def close(self) -> None:
        """The worker has ended, and what it printed stays."""
        self.look()
        if self._read >= 0:
            os.close(self._read)
        self._read = -1

    @property
    def text(self) -> str:
        self.look()
        return self._kept.decode(errors="replace").strip()

    def last_words(self) -> str:
        """See :func:`.last_line`."""
        return last_line(self.text)
