"""Stage 2, compile: one attempt at a job. Receives a request, hands on the result of a worker process, which it starts and listens to.

The controller's own workers and a worker on another machine run the same process (:mod:`.worker`); what they do with its progress and
its wishes is theirs.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from typing import Protocol

import msgspec
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem, ToolchainError, from_dict
from edgefleet_shared.malformed import MALFORMED
from edgefleet_shared.work import Answer, Progress

from edgefleet_controller.compile.port import CompileResult
from edgefleet_controller.compile.watching import signal_name
from edgefleet_controller.compile.worker import Failed, Finished, JobRequest, Line, Said, Wanted

END_PATIENCE_S = 5.0


class Listener(Protocol):
    """Who asked for the attempt."""

    def progress(self, step: Progress) -> None:
        """What is being done now."""
        ...

    def log(self, text: str) -> None:
        """What the toolchains printed."""
        ...

    def measure(self, manifest: str) -> Answer:
        """Have a candidate measured by a builder board of its class; waits."""
        ...


class Attempt:
    """A worker process, for as long as the ``with`` block lasts.

    Raises:
        EnvironmentProblem: it could not be started.
    """

    def __init__(self, request: JobRequest) -> None:
        self._request = request
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "edgefleet_controller.compile.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        except OSError as exc:
            raise EnvironmentProblem(f"no compile worker could be started: {exc.strerror}") from exc

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *_: object) -> None:
        """Let a process that has said its last word end; one that does not is killed."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(END_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def cancel(self) -> None:
        """End it soon; :meth:`run` raises."""
        self._child.send_signal(signal.SIGTERM)

    def run(self, listener: Listener) -> CompileResult:
        """Until the process has ended.

        Raises:
            EdgefleetError: what the compile ended in, or that its process died.
        """
        try:
            return self._converse(listener)
        except (*MALFORMED, BrokenPipeError) as exc:
            # A process that was killed leaves half a line, or a pipe that nobody reads.
            raise self._ended() from exc

    def _converse(self, listener: Listener) -> CompileResult:
        assert self._child.stdout is not None
        self._say(self._request)
        for text in self._child.stdout:
            match msgspec.json.decode(text, type=Line):
                case Progress() as step:
                    listener.progress(step)
                case Wanted(manifest):
                    self._say(listener.measure(manifest))
                case Said(log):
                    listener.log(log)
                case Finished(result):
                    return result
                case Failed(error):
                    raise from_dict(error)
        raise self._ended()

    def _ended(self) -> EdgefleetError:
        """Why there is no result. A process that was killed tells of this machine; one that ended by itself failed over its job."""
        status = self._child.wait()
        if status < 0:
            return EnvironmentProblem(
                f"the compile worker's process died: {signal_name(-status)}",
                hint="compile it again; if memory is short, let fewer jobs run at once: compile_workers in controller.yaml, fleet worker run --jobs",
            )
        return ToolchainError(f"the compile worker ended with status {status} and no result", hint="see the log")

    def _say(self, message: msgspec.Struct) -> None:
        # The pipe stays open: its end tells the process that nobody listens any more.
        assert self._child.stdin is not None
        self._child.stdin.write(msgspec.json.encode(message) + b"\n")
        self._child.stdin.flush()
