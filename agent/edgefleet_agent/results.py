"""Stage 9, health: results. Receives how an assignment ended, hands it on once it is signed with the board's key.

Level-triggered like all else: what the journal says ended and has no signature is signed, at once or after a restart. Signing is a
one-shot child (:mod:`edgefleet_agent.sign_child`), so that neither the key nor cryptography (8 MB) comes into the resident agent.
A board that can't sign says so, tells the result without a signature, and goes on trying.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
from edgefleet_shared import results
from edgefleet_shared.assignment import Subject
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem
from edgefleet_shared.malformed import MALFORMED
from edgefleet_shared.messages import Body, Ended, OutcomeTold, SignedResult

from edgefleet_agent import sandbox
from edgefleet_agent.inbox import JobBroke, SigningDone
from edgefleet_agent.journal import Keeper
from edgefleet_agent.ports import Ports
from edgefleet_agent.reporting import Told
from edgefleet_agent.sandbox import Limits

log = logging.getLogger(__name__)

LIMITS = Limits(memory_bytes=192 * 1024 * 1024, time_s=60.0)
AGAIN_S = 5.0
TRIES = 3  # before a result is told without a signature


class SignRequest(msgspec.Struct, frozen=True, kw_only=True):
    """parent -> child, on its stdin. ``key`` is a URI as securesystemslib's signers take it; ``identity`` the folder of the certificate."""

    identity: str
    key: str
    payload: bytes


class ChildSigner:
    """The real signer (:class:`edgefleet_agent.ports.Signer`): a child of its own for each signature.

    Args:
        identity: the folder with the certificate.
        key: where its private key is. A file today; ``hsm:`` or another scheme of securesystemslib names a token's.
    """

    def __init__(self, identity: Path, key: str = "") -> None:
        self._identity = identity.resolve()
        self._key = key or f"file2:{self._identity / 'agent.key'}"

    def sign(self, payload: bytes) -> SignedResult:
        """Raises EnvironmentProblem: the child could not do its work."""
        if len(payload) > results.MAX_PAYLOAD_BYTES:
            raise EnvironmentProblem(f"a result of {len(payload)} bytes is too large to be signed")
        request = SignRequest(identity=str(self._identity), key=self._key, payload=payload)
        ended = sandbox.run("edgefleet_agent.sign_child", msgspec.json.encode(request), LIMITS)
        try:
            if len(ended.reports) == 1:
                return msgspec.json.decode(ended.reports[0], type=SignedResult)
        except MALFORMED as exc:
            raise EnvironmentProblem(f"the signing child answered nonsense: {exc}") from exc
        raise EnvironmentProblem(
            f"the board's key could not sign: {ended.problem or 'no answer'} {ended.output[-300:]}".rstrip()
        )


class Results:
    """Signs what ended, one after the other.

    Args:
        subject: what the line's assignments are about.
        tell: puts an event into the spool.
        put: the inbox.
        problem: notes why the board can't sign, "" when it can again.
        report: tells it with where the board is.
    """

    def __init__(
        self, device: str, subject: Subject, keeper: Keeper, ports: Ports, *, tell: Callable[[Body], None],
        put: Callable[[SigningDone | JobBroke], None], problem: Callable[[str], None], report: Callable[[Told], None],
    ) -> None:  # fmt: skip
        self._device, self._subject, self._keeper, self._ports = device, subject, keeper, ports
        self._tell, self._put, self._problem, self._report = tell, put, problem, report
        self._waiting: deque[Ended] = deque()
        self._at_work = False
        self._tries, self._again_at = 0, 0.0

    def begin(self) -> None:
        """The journal is there: what an earlier start left unsigned is signed now. So is what an older version signed without saying
        what it is about."""
        now, signed = self._keeper.now, None
        if now.result is not None:
            said = results.decode(results.payload(now.result.envelope))
            if said.subject is self._subject:
                signed = said.ended
                self._report(Told(ended=signed, result=now.result))
        if now.ended is not None and now.ended != signed:
            self.sign(now.ended)

    def sign(self, ended: Ended) -> None:
        """An assignment ended."""
        self._waiting.append(ended)
        self._next()

    def tick(self) -> None:
        """Try again when it is time."""
        if self._waiting and self._ports.clock.monotonic() >= self._again_at:
            self._next()

    def _next(self) -> None:
        if self._at_work or not self._waiting:
            return
        self._at_work, ended = True, self._waiting[0]
        signer, put = self._ports.signer, self._put
        payload = results.encode(self._device, ended, self._subject)

        def work() -> None:
            result: SignedResult | EdgefleetError
            try:
                result = signer.sign(payload)
            except EdgefleetError as exc:
                result = exc
            except Exception as exc:  # noqa: BLE001 - raised again by the loop
                put(JobBroke(exc))
                return
            put(SigningDone(ended, result))

        try:
            self._ports.spawn("sign", work)
        except EnvironmentProblem as exc:
            self.done(SigningDone(ended, exc))

    def done(self, done: SigningDone) -> None:
        """The child has answered."""
        self._at_work = False
        match done.result:
            case SignedResult() as result:
                self._waiting.popleft()
                self._tries = 0
                self._problem("")
                # The event first: an agent that dies between the two signs and tells it once more; the other way round it would be missing.
                self._tell(OutcomeTold(ended=done.ended, result=result))
                self._keep(done.ended, result)
                self._report(Told(ended=done.ended, result=result))
                self._next()
            case error:
                self._tries += 1
                self._again_at = self._ports.clock.monotonic() + AGAIN_S
                self._problem(f"the last result is not signed: {error}")
                if self._tries == TRIES:
                    self._tell(OutcomeTold(ended=done.ended))
                    self._report(Told(ended=done.ended))

    def _keep(self, ended: Ended, result: SignedResult) -> None:
        """For the next start, unless something newer has ended since. A disk that refuses is no reason to be silent: that start signs again."""
        if self._keeper.now.ended != ended:
            return
        try:
            self._keeper.keep(result=result)
        except EnvironmentProblem as exc:
            log.warning("result not kept", extra={"reason": str(exc)})
