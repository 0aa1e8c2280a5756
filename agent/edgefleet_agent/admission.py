"""Stage 6, verify: what is wanted of the board. Receives ``desired`` messages and metadata, hands on the assignment to take up.

Level-triggered: only the newest ``desired`` message counts, and each one is decided about once, also across restarts. Asking the
verifying child takes a moment, so it runs on a thread whose answer comes back through the runner's inbox.

Not handled here: the checks themselves (:mod:`edgefleet_agent.verify`), what happens next (:mod:`edgefleet_agent.runner`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
from edgefleet_shared.artifact import digest_of
from edgefleet_shared.assignment import MAX_ASSIGNMENT_BYTES, Admission, Incomplete, metadata_files
from edgefleet_shared.clock import Clock
from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.exhaustive import assert_never
from edgefleet_shared.fingerprint import Fingerprint
from edgefleet_shared.messages import Body, Ended, OutcomeTold, Refused
from edgefleet_shared.outcomes import Outcome

from edgefleet_agent import verify
from edgefleet_agent.journal import Keeper
from edgefleet_agent.settings import Settings
from edgefleet_agent.transport import Uplink

log = logging.getLogger(__name__)

ASK_AGAIN_S = 5.0  # an admission that could not be decided


class AdmissionDone(msgspec.Struct, frozen=True):
    """Inbox: what the verifying child said about a ``desired`` message."""

    digest: str
    result: Admission | verify.Refusal | EdgefleetError


class Admissions:
    """Decides about ``desired`` messages, one at a time; a verified one becomes the journal's ``pending``.

    Args:
        tell: puts an event into the spool.
        put: the inbox, for :class:`AdmissionDone`.
    """

    def __init__(
        self,
        state: Path,
        settings: Settings,
        board: Fingerprint,
        keeper: Keeper,
        uplink: Uplink,
        clock: Clock,
        *,
        tell: Callable[[Body], None],
        put: Callable[[AdmissionDone], None],
    ) -> None:
        self._state, self._settings, self._board = state, settings, board
        self._keeper, self._uplink, self._clock = keeper, uplink, clock
        self._tell, self._put = tell, put
        self._desired: bytes | None = None
        self._asking = False
        self._ask_again_at: float | None = None
        self._root_version = 0

    def follow_metadata(self) -> None:
        """Subscribe to the metadata that the trusted root makes needed."""
        root = msgspec.json.decode(verify.read_root(self._state))
        version = root["signed"]["version"]
        if version != self._root_version:
            self._root_version = version
            self._uplink.follow_metadata(metadata_files(self._settings.device_class, version))

    def desire(self, desired: bytes) -> None:
        """A ``desired`` message came: the newest one counts."""
        self._desired = desired
        self._consider()

    def take_metadata(self, name: str, content: bytes) -> None:
        """A metadata file came: what could not be decided before may be now."""
        if verify.take_metadata(self._state, name, content):
            self._consider()

    def tick(self) -> None:
        """Ask again when it is time."""
        if self._ask_again_at is not None and self._clock.monotonic() >= self._ask_again_at:
            self._ask_again_at = None
            self._consider()

    def _consider(self) -> None:
        """Have the newest ``desired`` message verified, unless that was done."""
        desired = self._desired
        if desired is None or self._asking or len(desired) > MAX_ASSIGNMENT_BYTES:
            return
        digest = digest_of(desired)
        if digest == self._keeper.now.desired_seen:
            return
        self._asking = True

        def ask() -> None:
            result: Admission | verify.Refusal | EdgefleetError
            try:
                result = verify.admit(self._state, self._settings, self._board, desired, self._clock.now())
            except (verify.Refusal, EdgefleetError) as exc:
                result = exc
            self._put(AdmissionDone(digest, result))

        threading.Thread(target=ask, name="admit", daemon=True).start()

    def done(self, done: AdmissionDone) -> bool:
        """The verifying child has answered. Returns whether a decision was made, which is to be reported."""
        self._asking = False
        match done.result:
            case Admission(assignment=assignment):
                self._keeper.keep(desired_seen=done.digest, refusal="", pending=assignment)
                self.follow_metadata()
            case verify.Refusal():
                self._refuse(done.digest, done.result)
            case EdgefleetError():
                level = logging.INFO if isinstance(done.result, Incomplete) else logging.WARNING
                log.log(level, "admission waits", extra={"reason": str(done.result)})
                self._ask_again_at = self._clock.monotonic() + ASK_AGAIN_S
                return False
            case _:
                assert_never(done.result)
        self._consider()  # a newer message may have come meanwhile
        return True

    def _refuse(self, digest: str, refusal: verify.Refusal) -> None:
        reason = str(refusal.error)
        ended = self._keeper.now.ended
        if refusal.assignment:
            ended = Ended(
                assignment=refusal.assignment, manifest="", outcome=Outcome.REJECTED, reason=reason,
                at=self._clock.now(),
            )  # fmt: skip
        self._keeper.keep(desired_seen=digest, refusal=reason, ended=ended)
        log.warning("assignment refused", extra={"digest": digest, "reason": reason})
        check = getattr(refusal.error, "check", refusal.error.code)
        self._tell(Refused(desired=digest, check=check, reason=reason))
        if ended is not None and refusal.assignment:
            self._tell(OutcomeTold(ended=ended))
