"""Identity: the certificate's renewal. Receives the board's certificate, hands on one for a whole life again, when two thirds of its own are over.

The key stays: only one file changes, in one step, so that whatever is cut, key and certificate belong together. The next connection
shows the new one; until then the old one does, which is good for months. Asking is a one-shot child (:mod:`edgefleet_agent.renew_child`): an HTTP
client and cryptography are memory that is needed once in eight months.

Not handled here: a certificate that has ended gets nobody onto the line, and so no other one: such a board is enrolled again.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec
from edgefleet_shared import atomic
from edgefleet_shared.certificates import AGAIN_LAST_S, LOOK_S, is_due, validity
from edgefleet_shared.clock import iso
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem, from_dict
from edgefleet_shared.malformed import MALFORMED
from edgefleet_shared.messages import Renewed

from edgefleet_agent import sandbox, verify
from edgefleet_agent.ports import Ports
from edgefleet_agent.sandbox import Limits
from edgefleet_agent.settings import Settings

log = logging.getLogger(__name__)

LIMITS = Limits(memory_bytes=192 * 1024 * 1024, time_s=90.0)


class RenewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """parent -> child: the board's state folder; where the controller is."""

    state: str
    settings: Settings


class NotRenewed(msgspec.Struct, frozen=True):
    """child -> parent, in place of a :class:`Renewed`."""

    error: dict[str, str]


class Renewer(Protocol):
    """The port: how a certificate is asked for."""

    def renew(self) -> str:
        """Another one (PEM) for the same key. Blocking. Raises EdgefleetError."""
        ...


class ChildRenewer:
    """The real renewer: a child of its own for each question."""

    def __init__(self, state: Path, settings: Settings) -> None:
        self._request = RenewRequest(state=str(state.resolve()), settings=settings)

    def renew(self) -> str:
        """As the port has it."""
        if not self._request.settings.api_host:
            raise EnvironmentProblem("this board knows no address of the controller's API", hint="enrol it again")
        ended = sandbox.run("edgefleet_agent.renew_child", msgspec.json.encode(self._request), LIMITS)
        with suppress(*MALFORMED, ValueError):
            (line,) = ended.reports
            answer = msgspec.json.decode(line)
            if "error" in answer:
                raise from_dict(msgspec.convert(answer, NotRenewed).error)
            return msgspec.convert(answer, Renewed).certificate
        raise EnvironmentProblem(
            f"the renewing child gave no answer: {ended.problem or 'status 0'}{ended.last_words()}"
        )


class Renewal:
    """Looks after the certificate of one board.

    Args:
        problem: notes why it could not be renewed, "" when it is.
    """

    def __init__(self, state: Path, renewer: Renewer, ports: Ports, problem: Callable[[str], None]) -> None:
        self._state, self._renewer, self._problem = state, renewer, problem
        self._clock, self._files, self._spawn = ports.clock, ports.files, ports.spawn
        self._certificate = state / "identity" / "agent.pem"
        self._answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._asking = False
        self._look_at, self._pause_s = 0.0, LOOK_S
        self._told = ""

    def turn(self) -> None:
        """Do what is due. For the loop's thread alone; does not wait.

        Raises:
            whatever is no EdgefleetError: a bug of ours.
        """
        with suppress(queue.Empty):
            self._done(self._answers.get_nowait())
        now = self._clock.monotonic()
        if self._asking or now < self._look_at:
            return
        self._look_at = now + LOOK_S
        try:
            due = self._is_due()
        except EnvironmentProblem as exc:
            self._tell(str(exc))
            return
        if due:
            self._asking = True
            try:
                self._spawn("renew", self._ask)
            except EnvironmentProblem as exc:
                self._done(exc)
        elif self._told:  # it could not be read, or the clock was wrong, until now
            self._tell("")

    def _tell(self, problem: str) -> None:
        self._told = problem
        self._problem(problem)

    def _is_due(self) -> bool:
        now = self._clock.now()
        with suppress(EnvironmentProblem):  # told by the admission, which can't do without
            now = max(now, verify.read_floors(self._state, files=self._files).clock)  # a board may have no clock
        return is_due(self._certificate, now)

    def _ask(self) -> None:
        try:
            renewed = self._renewer.renew()
            atomic.write(self._certificate, renewed.encode(), files=self._files)
        except Exception as exc:  # noqa: BLE001 - looked at by the loop
            self._answers.put(exc)
        else:
            self._answers.put(None)

    def _done(self, error: Exception | None) -> None:
        self._asking = False
        if error is None:
            # If it is due at once again, it is the clock that is wrong.
            self._look_at, self._pause_s = self._clock.monotonic() + AGAIN_LAST_S, LOOK_S
            log.info("certificate renewed", extra={"reason": f"the new one ends at {self._ends()}"})
            self._tell("")
        elif isinstance(error, EdgefleetError):
            self._look_at = self._clock.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, AGAIN_LAST_S)
            self._tell(f"the certificate, which ends at {self._ends()}, could not be renewed: {error}")
        else:
            raise error

    def _ends(self) -> str:
        return iso(validity(self._certificate)[1])
