"""The rollout service on a real database, with boards that read what is retained and report: killed anywhere, it ends the same."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from edgefleet_controller.health import Intake
from edgefleet_controller.pki import CertificateAuthority
from edgefleet_controller.results import ResultVerifier
from edgefleet_controller.rollout.fakes import RetainingPublisher, UnsignedDirector, read_unsigned
from edgefleet_controller.rollout.service import RolloutService
from edgefleet_controller.rollout.views import (
    ENDED,
    GateSpec,
    IntentKind,
    Phase,
    Rollout,
    RolloutSpec,
    Selector,
    Standing,
)
from edgefleet_controller.store import catalog, devices
from edgefleet_controller.store.database import Database
from edgefleet_controller.store.tables import Artifact
from edgefleet_shared.artifact import digest_of
from edgefleet_shared.assignment import AGENT, Subject
from edgefleet_shared.clock import ManualClock
from edgefleet_shared.contract import Verdict
from edgefleet_shared.errors import ConflictError, InputError, NotFoundError, TransportError, TrustError
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import AgentReport, Ended, Event, Health, Presence, Reported, SlotReport, decode, encode
from edgefleet_shared.outcomes import Outcome
from edgefleet_shared.trust import Assignment
from sqlalchemy import event
from support.broker import until
from support.signing import BoardKey
from support.simulated_boards import FINGERPRINT, REQUIREMENT, manifest, spec


class Killed(BaseException):
    """The process ends here. No handler may hold it up."""


class Chaos:
    """Counts the steps between which a controller can be killed, and kills at one of them."""

    def __init__(self) -> None:
        self.at, self.step = -1, 0

    def between(self) -> None:
        self.step += 1
        if self.step == self.at:
            raise Killed


class Director(UnsignedDirector):
    def __init__(self, chaos: Chaos) -> None:
        self.chaos, self.refuses = chaos, ""

    def sign(self, assignment: Assignment, version: int) -> bytes:
        self.chaos.between()
        if self.refuses:
            raise TrustError("director", self.refuses)
        return super().sign(assignment, version)


class Broker(RetainingPublisher):
    def __init__(self, chaos: Chaos) -> None:
        super().__init__()
        self.chaos, self.down = chaos, False

    def publish_desired(self, device: str, assignment: bytes) -> None:
        self.chaos.between()
        if self.down:
            raise TransportError("the broker is gone")
        super().publish_desired(device, assignment)
        self.chaos.between()

    def retained_about(self, subject: Subject) -> dict[str, bytes]:
        return self.retained if subject is Subject.MODEL else self.retained_agent


class Site:
    """Controller and boards. Boards outlive the controller.

    Args:
        subject: what is rolled out: a model, or the agent itself.
    """

    def __init__(
        self, folder: Path, boards: dict[str, str], bad_versions: tuple[str, ...] = (), subject: Subject = Subject.MODEL
    ) -> None:
        self.subject, self.model = subject, AGENT if subject is Subject.AGENT else "m"
        self.clock, self.chaos = ManualClock(), Chaos()
        self.director, self.broker = Director(self.chaos), Broker(self.chaos)
        self.url = f"sqlite:///{folder}/fleet.db"
        self.bad_versions = bad_versions
        self.given: dict[str, list[tuple[str, int]]] = {name: [] for name in boards}
        self.restored = False
        self.reports: dict[str, Reported] = {}
        self.kills = 0
        database = Database(self.url)
        database.migrate()
        with database.write() as session:
            for device_class in sorted(set(boards.values())):
                devices.put_class(session, device_class, "{}", 1.0)
                for version in ("1", "2", "3"):
                    catalog.add_version(session, self.model, version, f"sha256:{version}", "{}", 1.0)
                    catalog.put_artifact(
                        session,
                        Artifact(
                            manifest=manifest(device_class, version), model=self.model, version=version, device_class=device_class,
                            manifest_bytes=700, size_bytes=5000, state="signed", created_at=1.0,
                            requirement=msgspec.json.encode(REQUIREMENT).decode(),
                        ),
                    )  # fmt: skip
            for name, device_class in boards.items():
                devices.enrol(session, name, device_class, now=1.0)
        database.close()
        self.boards = boards
        self.ca = CertificateAuthority.create(folder / "ca", self.clock)
        self.keys = {name: BoardKey.enrolled(self.ca, name) for name in boards}
        self.start()
        for name, device_class in boards.items():
            report = Reported(
                device=name, device_class=device_class, boot="boot1", at=1.0, state=State.IDLE, agent_version="1",
                fingerprint=FINGERPRINT, agent=AgentReport(),
            )  # fmt: skip
            self.reports[name] = self.saying(report, active=self.slot(device_class, "1"))
            self.intake.presence(name, Presence(online=True, boot="boot1"))
            self.intake.reported(name, self.reports[name])

    def slot(self, device_class: str, version: str) -> SlotReport:
        return SlotReport(manifest=manifest(device_class, version), model=self.model, version=version, status="good")

    def said(self, report: Reported) -> Reported | AgentReport:
        """The part of a report that is about what is rolled out."""
        if self.subject is Subject.MODEL:
            return report
        assert report.agent is not None
        return report.agent

    def saying(self, report: Reported, **changes: object) -> Reported:
        """A report with other words in that part."""
        changed = msgspec.structs.replace(self.said(report), **changes)
        return changed if isinstance(changed, Reported) else msgspec.structs.replace(report, agent=changed)

    def start(self) -> None:
        """A controller process: all that it knows is in the database."""
        self.database = Database(self.url)
        event.listen(self.database.engine, "commit", lambda _connection: self.chaos.between())
        self.intake = Intake(self.database, self.clock, ResultVerifier(self.ca.certificate))
        self.service = RolloutService(self.database, self.director, self.broker, self.intake, self.clock)

    def hear(self) -> None:
        """What the broker retains comes again to a controller that connects."""
        for name, report in self.reports.items():
            self.intake.presence(name, Presence(online=True, boot="boot1"))
            self.intake.reported(name, report)

    def backup(self) -> Path:
        """What an operator copies while the controller is stopped."""
        self.database.close()
        source = Path(self.url.removeprefix("sqlite:///"))
        copy = Path(shutil.copy(source, source.with_name("backup.db")))
        self.start()
        self.hear()
        return copy

    def restore(self, copy: Path) -> None:
        """The backup runs, and has heard nothing yet."""
        self.database.close()
        source = Path(self.url.removeprefix("sqlite:///"))
        for left in source.parent.glob(f"{source.name}-*"):
            left.unlink()
        shutil.copy(copy, source)
        self.restored = True
        self.clock.advance(600)  # versions are numbered by the minute
        self.start()

    def tick(self) -> None:
        try:
            self.service.tick()
            self.chaos.between()
        except Killed:
            self.kills += 1
            self.database.close()
            self.start()
            self.hear()

    def work(self) -> None:
        """Every board looks at what is retained for it, and does it."""
        for name, payload in self.broker.retained_about(self.subject).items():
            report, device_class = self.reports[name], self.boards[name]
            if self.said(report).desired_seen == digest_of(payload):
                continue
            wanted, version = read_unsigned(payload)
            known = self.given[name]
            assert wanted.device == name
            if known and version <= known[-1][1]:
                assert self.restored, "an assignment's version must rise"
                self.reports[name] = self.saying(report, desired_seen=digest_of(payload), refusal="older than the last")
                self.intake.reported(name, self.reports[name])
                continue
            known.append((wanted.id, version))
            told = self.said(report).ended
            if told is not None and told.assignment == wanted.id:
                self.reports[name] = self.saying(report, desired_seen=digest_of(payload), refusal="")
                self.intake.reported(name, self.reports[name])
                continue
            good = wanted.version not in self.bad_versions
            active = self.slot(device_class, wanted.version) if good else self.said(report).active
            ended = Ended(
                assignment=wanted.id, manifest=wanted.manifest, reason="" if good else "agreement too low",
                outcome=Outcome.SUCCEEDED if good else Outcome.FAILED_NO_CHANGE, number=len(known),
            )  # fmt: skip
            report = self.saying(
                report, assignment=wanted.id, desired_seen=digest_of(payload), active=active, ended=ended,
                result=self.keys[name].sign(ended, self.subject),
            )  # fmt: skip
            self.reports[name] = report
            self.intake.reported(name, report)

    def run(self, name: str, rounds: int = 60) -> Rollout:
        for _ in range(rounds):
            self.tick()
            self.work()
            self.clock.advance(1)
            rollout = self.service.get(name)
            if rollout.phase in ENDED | {Phase.PAUSED}:
                return rollout
        return rollout

    def create(self, name: str = "r2", version: str = "2", **fields: object) -> RolloutSpec:
        wanted = spec(model=self.model, version=version, **fields)
        self.service.create(name, wanted)
        return wanted

    def versions(self) -> dict[str, str]:
        active = {name: self.said(report).active for name, report in self.reports.items()}
        return {name: slot.version if slot else "" for name, slot in active.items()}


BOARDS = {"a1": "x86", "a2": "x86", "a3": "x86", "b1": "arm", "b2": "arm"}


def standings(rollout: Rollout) -> dict[str, tuple[Standing, Outcome | None, str]]:
    return {d: (p.standing, p.outcome, numbered(p.assignment)) for d, p in rollout.boards.items()}


def numbered(assignment: str) -> str:
    """Its rollout, board and number; when it was given, which its name ends with, differs with what went wrong on the way."""
    return assignment.rpartition(".")[0]


def test_boards_whose_state_has_no_name_here_take_part_and_are_waited_for_before_they_count_as_back(
    tmp_path: Path,
) -> None:
    site = Site(tmp_path, BOARDS, ("2",))
    for name, report in list(site.reports.items()):
        told = encode(report).replace(b'"state":"idle"', b'"state":"dreaming"')
        site.reports[name] = decode(told, Reported)
        site.intake.reported(name, site.reports[name])
    site.create()
    assert site.run("r2").phase is Phase.ROLLING_BACK
    assert {board.state for board in site.reports.values()} == {State("dreaming")}
    for name, report in list(site.reports.items()):
        site.reports[name] = msgspec.structs.replace(report, state=State.IDLE)
        site.intake.reported(name, site.reports[name])
    assert site.run("r2").phase is Phase.ROLLED_BACK


@pytest.mark.parametrize(("bad", "phase"), [((), Phase.SUCCEEDED), (("2",), Phase.ROLLED_BACK)])
def test_killed_between_any_two_steps_it_goes_on_and_ends_the_same(
    tmp_path: Path, bad: tuple[str, ...], phase: Phase
) -> None:
    def play(folder: Path, kill_at: int) -> tuple[Site, Rollout]:
        folder.mkdir()
        site = Site(folder, BOARDS, bad)
        site.create()
        site.chaos.step, site.chaos.at = 0, kill_at
        return site, site.run("r2")

    calm, expected = play(tmp_path / "calm", -1)
    assert expected.phase is phase
    steps = calm.chaos.step
    assert steps > 20, "every signature, publication and commit is a step"
    for kill_at in range(1, steps + 1):
        site, rollout = play(tmp_path / str(kill_at), kill_at)
        assert site.kills == 1
        assert rollout.phase is phase, kill_at
        assert standings(rollout) == standings(expected), kill_at
        assert [g.verdict for g in rollout.gates] == [g.verdict for g in expected.gates]
        assert site.versions() == calm.versions()
        assert {d: [numbered(name) for name, _ in given] for d, given in site.given.items()} == {
            d: [numbered(name) for name, _ in given] for d, given in calm.given.items()
        }, "no board is told anything twice, or anything else"
        site.database.close()


def test_a_broker_that_is_gone_delays_and_loses_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path, BOARDS)
    site.create()
    site.broker.down = True
    site.run("r2", rounds=5)
    assert site.broker.retained == {}
    site.broker.down = False
    assert site.run("r2").phase is Phase.SUCCEEDED


def test_a_board_that_was_revoked_finds_nothing_that_is_wanted_of_it(tmp_path: Path) -> None:
    site = Site(tmp_path, BOARDS)
    site.create()
    assert site.run("r2").phase is Phase.SUCCEEDED
    assert {"b1", "b2"} <= set(site.broker.retained)
    site.broker.down = True
    with site.database.write() as session:
        devices.revoke(session, "b1")
    site.service.tick()
    site.database.close()
    site.start()  # while the broker is away
    site.broker.down = False
    site.service.tick()
    assert (site.broker.retained["b1"], bool(site.broker.retained["b2"])) == (b"", True)
    count = site.broker.count
    site.service.tick()
    assert site.broker.count == count


def test_a_director_that_can_not_sign_pauses_with_the_reason_and_costs_no_board(tmp_path: Path) -> None:
    site = Site(tmp_path, BOARDS)
    site.create()
    site.director.refuses = "the key is gone"
    rollout = site.run("r2")
    assert rollout.phase is Phase.PAUSED
    assert "the key is gone" in rollout.reason
    assert all(p.tries == 0 for p in rollout.boards.values())
    site.director.refuses = ""
    site.service.intend("r2", IntentKind.RESUME)
    assert site.run("r2").phase is Phase.SUCCEEDED


def test_two_rollouts_do_not_fight_over_a_board(tmp_path: Path) -> None:
    site = Site(tmp_path, BOARDS)
    site.create("r2")
    with pytest.raises(ConflictError, match="a1 by r2"):
        site.create("r3", version="3")
    assert site.run("r2").phase is Phase.SUCCEEDED
    site.create("r3", version="3")
    assert site.run("r3").phase is Phase.SUCCEEDED
    assert set(site.versions().values()) == {"3"}


def test_an_ended_rollout_can_be_rolled_back_and_a_later_one_is_not_undone_by_it(tmp_path: Path) -> None:
    site = Site(tmp_path, BOARDS)
    site.create("r2")
    site.run("r2")
    site.service.intend("r2", IntentKind.ROLLBACK, "ann")
    assert site.service.get("r2").phase is Phase.SUCCEEDED
    site.tick()
    assert site.run("r2").phase is Phase.ROLLED_BACK
    assert set(site.versions().values()) == {"1"}
    site.create("r3", version="3")
    assert site.run("r3").phase is Phase.SUCCEEDED


def test_what_can_not_be_rolled_out_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path, {"a1": "x86"})
    for error, wanted in (
        (InputError, spec(selector=Selector(classes=("nowhere",)))),
        (InputError, spec(gate=GateSpec(max_failed_share=float("nan")))),
        (NotFoundError, spec(version="9")),
    ):
        with pytest.raises(error):
            site.service.create("r2", wanted)
    with pytest.raises(NotFoundError):
        site.service.get("r2")
    assert [row.wave for row in site.service.plan("r2", spec())] == ["canary"]
    assert site.broker.count == 0


def test_an_operators_word_wakes_the_loop(tmp_path: Path) -> None:
    site = Site(tmp_path, BOARDS)
    stop = threading.Event()
    loop = threading.Thread(target=site.service.run, args=(stop, 3600.0))
    loop.start()
    try:
        site.create()
        until(lambda: len(site.broker.retained) == 2, "both canaries were assigned")
        site.service.intend("r2", IntentKind.PAUSE)
        until(lambda: site.service.get("r2").phase is Phase.PAUSED, "the rollout paused")
    finally:
        stop.set()
        site.service.wake()
        loop.join(20)
    assert not loop.is_alive()


def test_errors_that_boards_measure_while_serving_fail_the_gate(tmp_path: Path) -> None:
    """The whole way: health events into the database, figures to the gate, the rollout undone."""
    site = Site(tmp_path, BOARDS)
    site.create(gate=GateSpec(max_error_rate=0.01))
    sequence = 0

    def measure(failed_of_new: int) -> None:
        nonlocal sequence
        sequence += 1
        site.intake.events(
            [
                Event(
                    device=name, boot="boot1", sequence=sequence, at=site.clock.now(),
                    body=Health(model="m", version=version, requests=100 * sequence,
                                failed=failed_of_new * sequence if version == "2" else 0),
                )
                for name, version in site.versions().items()
            ]
        )  # fmt: skip

    site.tick()
    measure(0)
    work, site.work = site.work, lambda: None  # type: ignore[method-assign]
    reported: list[Callable[[], None]] = []
    real, site.intake.reported = site.intake.reported, lambda d, m: reported.append(lambda: real(d, m))  # type: ignore[method-assign]
    work()  # the canaries serve version 2, but nobody was told yet
    for _ in range(3):
        measure(20)
    for tell in reported:
        tell()
    site.intake.reported, site.work = real, work  # type: ignore[method-assign]
    rollout = site.run("r2")
    assert rollout.phase is Phase.ROLLED_BACK
    assert "requests failed" in rollout.reason
    assert set(site.versions().values()) == {"1"}


def test_figures_survive_a_restart_of_the_controller(tmp_path: Path) -> None:
    site = Site(tmp_path, {"a1": "x86"})
    for n in (1, 2, 3):
        body = Health(model="m", version="1", requests=100 * n, failed=n, p95_ms=7.0)
        site.intake.events([Event(device="a1", boot="boot1", sequence=n, at=float(n), body=body)])
    before = site.intake.of("a1")
    assert (before.requests, before.failed, before.p95_ms) == (200, 2, 7.0)
    site.start()
    assert site.intake.of("a1") == before


def test_assignments_are_signed_anew_before_they_expire_and_move_no_board(tmp_path: Path) -> None:
    site = Site(tmp_path, BOARDS)
    site.create()
    assert site.run("r2").phase is Phase.SUCCEEDED
    before = {name: read_unsigned(payload) for name, payload in site.broker.retained.items()}
    standings_before = standings(site.service.get("r2"))
    assert site.service.renew_assignments(100.0) == 0
    site.clock.advance(200)
    assert site.service.renew_assignments(100.0) == len(BOARDS)
    assert site.service.renew_assignments(100.0) == 0
    site.tick()
    site.work()
    after = {name: read_unsigned(payload) for name, payload in site.broker.retained.items()}
    assert {name: wanted for name, (wanted, _) in after.items()} == {n: w for n, (w, _) in before.items()}
    assert all(after[name][1] > before[name][1] for name in BOARDS)
    site.tick()
    assert standings(site.service.get("r2")) == standings_before
    assert site.service.get("r2").phase is Phase.SUCCEEDED


def test_a_board_in_flight_ends_by_the_assignment_that_was_signed_anew_meanwhile(tmp_path: Path) -> None:
    site = Site(tmp_path, {"a1": "x86"})
    site.create(timeout_s=10_000.0)
    site.tick()
    site.clock.advance(200)
    assert site.service.renew_assignments(100.0) == 1
    assert site.run("r2").phase is Phase.SUCCEEDED
    assert site.versions() == {"a1": "2"}


@pytest.mark.parametrize("heard_first", [True, False])
@pytest.mark.parametrize("subject", Subject)
def test_a_controller_from_a_backup_orders_no_board_back_to_what_it_remembers(
    tmp_path: Path, subject: Subject, heard_first: bool
) -> None:
    """Assignments in force are signed anew before they expire, with a new number: a board would follow it."""
    site = Site(tmp_path, BOARDS, subject=subject)
    site.create()
    assert site.run("r2").phase is Phase.SUCCEEDED
    copy = site.backup()
    site.create("r3", version="3")
    assert site.run("r3").phase is Phase.SUCCEEDED
    site.restore(copy)
    site.clock.advance(200)
    if not heard_first:
        site.service.renew_assignments(100.0)
    site.hear()
    site.service.publish_all_again()
    for _ in range(3):
        site.tick()
        site.work()
        site.service.renew_assignments(100.0)
    assert set(site.versions().values()) == {"3"}
    site.create("r4", version="1")
    assert site.run("r4").phase is Phase.SUCCEEDED
    site.clock.advance(200)
    assert site.service.renew_assignments(100.0) == len(BOARDS), "it knows them again"


@pytest.mark.parametrize("lost", ["2", "3"])
def test_a_rollout_called_as_one_that_a_backup_lacks_is_followed_by_every_board(tmp_path: Path, lost: str) -> None:
    site = Site(tmp_path, BOARDS)
    copy = site.backup()
    site.create("again", version=lost)
    assert site.run("again").phase is Phase.SUCCEEDED
    site.restore(copy)
    site.hear()
    site.create("again", version="3")
    assert site.run("again").phase is Phase.SUCCEEDED
    assert set(site.versions().values()) == {"3"}


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
