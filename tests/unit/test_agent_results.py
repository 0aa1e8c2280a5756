"""The board's word is told before it is kept: what dies between the two is told once more, never not at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from edgefleet_agent.inbox import SigningDone
from edgefleet_agent.journal import Keeper
from edgefleet_agent.ports import Ports
from edgefleet_agent.results import Results
from edgefleet_shared.assignment import Subject
from edgefleet_shared.messages import Ended, OutcomeTold, SignedResult
from edgefleet_shared.outcomes import Outcome

ENDED = Ended(assignment="a", manifest="sha256:" + "0" * 64, outcome=Outcome.SUCCEEDED, at=1.0, number=1)
RESULT = SignedResult(envelope=cast(Any, {}), certificate="")


def test_an_outcome_is_stored_as_an_event_before_the_journal_says_that_it_was_signed() -> None:
    did: list[str] = []
    keeper = SimpleNamespace(now=SimpleNamespace(ended=ENDED), keep=lambda *, result: did.append("kept"))
    ports = SimpleNamespace(signer=None, spawn=lambda name, work: None, clock=SimpleNamespace(monotonic=lambda: 0.0))
    results = Results(
        "b1", Subject.MODEL, cast(Keeper, keeper), cast(Ports, ports),
        tell=lambda body: did.append("told" if isinstance(body, OutcomeTold) else "?"), put=lambda item: None,
        problem=lambda why: None, report=lambda told: did.append("reported"),
    )  # fmt: skip
    results.sign(ENDED)
    results.done(SigningDone(ENDED, RESULT))
    assert did == ["told", "kept", "reported"]
