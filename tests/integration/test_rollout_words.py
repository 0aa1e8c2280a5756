"""What a broker says in boards' names: no wave advances by it."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgefleet_controller.rollout.fakes import read_unsigned
from edgefleet_controller.rollout.views import Phase, Standing
from edgefleet_controller.store import devices
from edgefleet_shared.assignment import Subject
from edgefleet_shared.contract import Verdict
from edgefleet_shared.messages import Ended, Reported, SlotReport
from edgefleet_shared.outcomes import Outcome
from edgefleet_shared.trust import Assignment
from support.rollout_sites import Site


def claimed(site: Site, report: Reported, wanted: Assignment, forge: str) -> Reported:
    """What a broker makes of a board's report: that it took what it was assigned."""
    active = SlotReport(manifest=wanted.manifest, model=wanted.model, version=wanted.version, status="good")
    ended = Ended(assignment=wanted.id, manifest=wanted.manifest, outcome=Outcome.SUCCEEDED)
    before = site.said(report)
    assert before.ended is not None
    replayed = forge == "with an old word, old signature and all"
    result = {
        "without a signature": None,
        "signed by another board": site.keys["a1" if report.device != "a1" else "a2"].sign(ended, site.subject),
        "signed about its other line": site.keys[report.device].sign(ended, *(set(Subject) - {site.subject})),
    }.get(forge, before.result)
    return site.saying(
        report, assignment=wanted.id, active=active, ended=before.ended if replayed else ended, result=result
    )


@pytest.mark.parametrize("subject", Subject)
@pytest.mark.parametrize(
    "forge",
    ["without a signature", "signed by another board", "signed about its other line", "with an old signature",
     "with an old word, old signature and all"],
)  # fmt: skip
def test_a_broker_that_forges_outcomes_advances_no_wave(tmp_path: Path, forge: str, subject: Subject) -> None:
    site = Site(tmp_path, dict.fromkeys(("a1", "a2", "a3"), "x86"), subject=subject)
    site.create("r1", version="3")
    assert site.run("r1").phase is Phase.SUCCEEDED
    site.create(attempts=2, retry_after_s=3.0)
    asked: set[str] = set()
    for _ in range(40):
        site.tick()
        for name, payload in site.broker.retained_about(subject).items():
            wanted, _ = read_unsigned(payload)
            if wanted.version != "2":
                continue
            asked.add(name)
            site.intake.reported(name, claimed(site, site.reports[name], wanted, forge))
        site.clock.advance(1)
    rollout = site.service.get("r2")
    assert len(asked) == 1, "only the canary was ever asked"
    (canary,) = asked
    if forge == "with an old word, old signature and all":
        # Its own word, of before, about another assignment: as if it had not spoken yet.
        assert (rollout.phase, rollout.boards[canary].standing) == (Phase.RUNNING, Standing.IN_FLIGHT)
        return
    assert rollout.phase is Phase.PAUSED
    assert rollout.boards[canary].standing is Standing.UNCLEAR
    assert rollout.boards[canary].signed is False
    assert all(gate.verdict is Verdict.INCONCLUSIVE for gate in rollout.gates)


@pytest.mark.parametrize("subject", Subject)
def test_a_broker_that_says_everybody_has_it_already_advances_no_wave(tmp_path: Path, subject: Subject) -> None:
    site = Site(tmp_path, dict.fromkeys(("a1", "a2", "a3"), "x86"), subject=subject)
    for name, report in site.reports.items():
        site.intake.reported(name, site.saying(report, active=site.slot("x86", "2")))
    site.create()
    assert not [p for p in site.service.get("r2").boards.values() if p.standing is Standing.HAD_IT]


@pytest.mark.parametrize("subject", Subject)
def test_a_board_from_before_signatures_is_believed_until_its_first_signed_word(
    tmp_path: Path, subject: Subject
) -> None:
    site = Site(tmp_path, {"a1": "x86"}, subject=subject)
    with site.database.write() as session:
        board = devices.get_device(session, "a1")
        board.must_sign, board.agent_must_sign = subject is not Subject.MODEL, subject is not Subject.AGENT
    unsigned: list[bool] = []
    real = site.intake.reported
    site.intake.reported = lambda d, m: real(d, site.saying(m, result=None) if unsigned else m)  # type: ignore[method-assign]
    unsigned.append(True)
    site.create()
    rollout = site.run("r2")
    assert rollout.phase is Phase.SUCCEEDED
    assert rollout.boards["a1"].signed is False
    unsigned.clear()
    site.create("r3", version="3")
    rollout = site.run("r3")
    assert rollout.boards["a1"].signed is True
    unsigned.append(True)
    site.create("r4", attempts=1)
    assert site.run("r4").phase is Phase.PAUSED
