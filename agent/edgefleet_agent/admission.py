"""Stage 6, verify: what is wanted of the board. Receives ``desired`` messages and metadata, hands on the assignment to take up.

Level-triggered: only the newest ``desired`` message counts, and each one is decided about once, also across restarts. What was refused is
looked at again after a start, when metadata came and when the clock was set: they may have been stale, or it wrong; what stays refused is told once. Asking
the verifying child takes a moment, so it runs on a thread whose answer comes back through the runner's inbox.

Not handled here: the checks themselves (:mod:`edgefleet_agent.verify`), what happens next (:mod:`edgefleet_agent.runner`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edgefleet_shared.artifact import digest_of
from edgefleet_shared.assignment import MAX_ASSIGNMENT_BYTES, Admission, Incomplete, Subject, metadata_files
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem
from edgefleet_shared.exhaustive import assert_never
from edgefleet_shared.fingerprint import Fingerprint
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import Body, Ended, Refused
from edgefleet_shared.outcomes import Outcome
from edgefleet_shared.results import MAX_REASON

from edgefleet_agent import verify
from edgefleet_agent.inbox import AdmissionDone, JobBroke
from edgefleet_agent.journal import Keeper
from edgefleet_agent.ports import Ports
from edgefleet_agent.reporting import next_number
from edgefleet_agent.settings import Settings

log = logging.getLogger(__name__)

ASK_AGAIN_S = 5.0  # an admission that could not be decided
CLOCK_SET_S = 60.0  # what makes metadata of days stale or not; a clock that is only slewed stays below it for weeks
LAST_FILE = "timestamp.json"  # of a publication, and so of what arrives after each connect


class Admissions:
    """Decides about ``desired`` messages, one at a time; a verified one becomes the journal's ``pending``.

    Args:
        tell: puts an event into the spool.
        tell_result: has a result signed and told.
        put: the inbox.
        problem: notes (what, why) when the board can't do its part, (what, "") when it can again.
        subject: what the messages are about.
        deciding: held while the floors are read, held against and written; shared by those who share a state folder.
    """

    def __init__(
        self,
        state: Path,
        settings: Settings,
        board: Fingerprint,
        keeper: Keeper,
        ports: Ports,
        *,
        tell: Callable[[Body], None],
        tell_result: Callable[[Ended], None],
        put: Callable[[AdmissionDone | JobBroke], None],
        problem: Callable[[str, str], None],
        subject: Subject,
        deciding: threading.Lock,
    ) -> None:
        self._state, self._settings, self._board = state, settings, board
        self._keeper, self._ports = keeper, ports
        self._tell, self._tell_result, self._put, self._problem = tell, tell_result, put, problem
        self._subject, self._deciding = subject, deciding
        self._desired: bytes | None = None
        self._unkept: dict[str, bytes] = {}
        self._begun = self._fresh = self._waits_for_fresh = False
        self._asking = ""  # the digest of the message that is being verified
        self._look_again = True  # at what was refused
        self._asked_by_s = 0.0  # by what the clock was ahead of the monotonic one then
        self._ask_again_at: float | None = None
        self._root_version = 0
        self._followed: tuple[str, ...] = ()

    def begin(self) -> None:
        """The journal is there: from now on decisions are made.

        Raises:
            TrustError: this board trusts no root, or a damaged one. EnvironmentProblem: the root can't be read.
        """
        self._follow_metadata()
        self._begun = True
        self._consider()

    def _follow_metadata(self) -> None:
        """Subscribe to the metadata that the trusted root makes needed."""
        version = verify.root_version(self._state, files=self._ports.files)
        if version != self._root_version:
            self._root_version = version
            self._followed = metadata_files(self._settings.device_class, version)
            self._ports.uplink.follow_metadata(self._followed)

    def connected(self) -> None:
        """The line is there (again). What the broker retained comes anew, the metadata last: what lies here may be old.

        An assignment that came while the board was away would be refused by it, as not released, and never looked at again.
        """
        self._fresh = False

    def desire(self, desired: bytes) -> None:
        """A ``desired`` message came: the newest one counts. An empty one says that nothing is wanted of the board any more: it stays as it
        is, and what is at work goes on."""
        if self._is_old(desired):
            return
        self._desired = desired
        if desired:
            self._consider()
        elif self._begun and self._keeper.now.refusal:
            with suppress(EnvironmentProblem):  # it is old news, then, until something else is wanted
                self._keeper.keep(desired_seen="", refusal="")

    def _is_old(self, desired: bytes) -> bool:
        """Whether another one came after it, which waits for its decision: versions only rise, so it was sent again."""
        decided, digest = self._keeper.now, digest_of(desired)
        newest = digest_of(self._desired) if self._desired else decided.desired_seen
        before = {self._asking, "" if decided.refusal else decided.desired_seen}
        return newest not in (digest, decided.desired_seen) and digest in before

    def take_metadata(self, name: str, content: bytes) -> None:
        """A metadata file came: what could not be decided before may be now. One that nobody asked for would only fill the disk."""
        if name not in self._followed:
            return
        self._unkept[name] = content
        self._fresh = self._fresh or name == LAST_FILE
        self._keep_metadata()

    def _keep_metadata(self) -> None:
        """Put what came onto the disk; when it refuses, later: the broker does not say it twice."""
        news = False
        try:
            for name, content in list(self._unkept.items()):
                news = verify.take_metadata(self._state, name, content, files=self._ports.files) or news
                del self._unkept[name]
        except EnvironmentProblem as exc:
            self._ask_again_at = self._ports.clock.monotonic() + ASK_AGAIN_S
            self._problem("metadata", str(exc))
        else:
            self._problem("metadata", "")
        self._look_again = self._look_again or news
        if news or self._waits_for_fresh:
            self._consider()

    def tick(self) -> None:
        """Ask again when it is time."""
        if self._ask_again_at is not None and self._ports.clock.monotonic() >= self._ask_again_at:
            self._ask_again_at = None
            self._keep_metadata()
            self._consider()
        if self._begun and self._keeper.now.refusal and abs(self._ahead_s() - self._asked_by_s) > CLOCK_SET_S:
            self._asked_by_s, self._look_again = self._ahead_s(), True
            self._consider()

    def _ahead_s(self) -> float:
        return self._ports.clock.now() - self._ports.clock.monotonic()

    def _consider(self) -> None:
        """Have the newest ``desired`` message verified, unless that was done."""
        desired, decided = self._desired, self._keeper.now
        if not self._begun or not desired or self._asking or len(desired) > MAX_ASSIGNMENT_BYTES:
            return
        digest = digest_of(desired)
        if digest == decided.desired_seen and not (decided.refusal and self._look_again):
            return
        # A file that the disk would not take is as good as one that has not arrived.
        self._waits_for_fresh = not self._fresh or bool(self._unkept)
        if self._waits_for_fresh:
            return
        self._asking, self._look_again, self._asked_by_s = digest, False, self._ahead_s()

        def ask() -> None:
            result: Admission | verify.Refusal | EdgefleetError
            try:
                result = self._admit(desired)
            except (verify.Refusal, EdgefleetError) as exc:
                result = exc
            except Exception as exc:  # noqa: BLE001 - raised again by the loop
                self._put(JobBroke(exc))
                return
            self._put(AdmissionDone(digest, result))

        try:
            self._ports.spawn("admit", ask)
        except EnvironmentProblem as exc:
            self._asking = ""
            self._wait(exc)

    def _admit(self, desired: bytes) -> Admission:
        with self._deciding:
            return verify.admit(
                self._state, self._settings, self._board, desired, self._ports.clock.now(),
                self._ports.examiner.admit, self._ports.files, self._subject,
            )  # fmt: skip

    def unverified(self) -> str:
        """Take the newest ``desired`` message through the trust path once more, whatever was decided about it.

        Returns:
            empty when the path came to a decision, whichever; else what was in the way. Blocking; safe on a job's thread.
        """
        desired = self._desired
        if not desired or not self._fresh:
            return "no assignment, or not all metadata, has arrived"
        try:
            self._admit(desired)
        except verify.Refusal:
            return ""
        except EdgefleetError as exc:
            return f"the trust path gives no answer: {exc}"
        return ""

    def done(self, done: AdmissionDone) -> bool:
        """The verifying child has answered. Returns whether a decision was made, which is to be reported."""
        self._asking = ""
        try:
            match done.result:
                case Admission() if self._overtaken(done.digest):
                    pass  # the board goes where it should be, not where it should have been
                case Admission(assignment=assignment):
                    self._keeper.keep(desired_seen=done.digest, refusal="", pending=assignment)
                    self._follow_metadata()
                case verify.Refusal():
                    self._refuse(done.digest, done.result)
                    self._follow_metadata()  # it may be the next root but one that is missing
                case EdgefleetError():
                    raise done.result
                case _:
                    assert_never(done.result)
        except EdgefleetError as exc:
            self._wait(exc)
            return False
        self._problem("admission", "")
        self._consider()  # a newer message may have come meanwhile
        return True

    def _overtaken(self, digest: str) -> bool:
        """Whether a newer message came while that one was verified. After an absence the broker brings what was missed, then the newest."""
        return self._desired is not None and digest_of(self._desired) != digest

    def _wait(self, error: EdgefleetError) -> None:
        """It can't be decided yet: ask again. Metadata on its way is nothing to tell, a board that can't do its part is."""
        log.info("admission waits", extra={"reason": str(error)})
        self._ask_again_at = self._ports.clock.monotonic() + ASK_AGAIN_S
        self._problem("admission", "" if isinstance(error, Incomplete) else str(error))

    def _refuse(self, digest: str, refusal: verify.Refusal) -> None:
        reason, decided = str(refusal.error), self._keeper.now
        if (digest, reason) == (decided.desired_seen, decided.refusal):
            return  # it was told
        ended = decided.ended
        # How it ends is said once: one that is at work, or has ended, may be signed anew and refused then.
        at_work = decided.assignment.id if decided.assignment and decided.life.state is not State.IDLE else ""
        ends = refusal.assignment not in ("", at_work, ended.assignment if ended else "")
        if ends:
            ended = Ended(
                assignment=refusal.assignment, manifest="", outcome=Outcome.REJECTED, reason=reason[:MAX_REASON],
                at=self._ports.clock.now(), number=next_number(decided),
            )  # fmt: skip
        self._keeper.keep(desired_seen=digest, refusal=reason, ended=ended)
        log.warning("assignment refused", extra={"digest": digest, "reason": reason})
        check = getattr(refusal.error, "check", refusal.error.code)
        self._tell(Refused(desired=digest, check=check, reason=reason))
        if ended is not None and ends:
            self._tell_result(ended)
