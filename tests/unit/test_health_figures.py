"""Figures for gates out of health events: counted once, and for the version that earned them."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

from edgefleet_controller.health import Intake, Kept, follow
from edgefleet_controller.pki import CertificateAuthority
from edgefleet_controller.results import ResultVerifier
from edgefleet_controller.store import devices
from edgefleet_controller.store.database import Database
from edgefleet_shared.clock import ManualClock
from edgefleet_shared.messages import Ack, Dropped, Event, Health, Presence, Refused
from sqlalchemy import event


def health(
    sequence: int, requests: int, failed: int = 0, version: str = "1", boot: str = "a", at: float | None = None
) -> Event:
    body = Health(model="m", version=version, requests=requests, failed=failed)
    return Event(device="b1", boot=boot, sequence=sequence, at=float(sequence) if at is None else at, body=body)


def figures(*events: Event) -> tuple[int, int, str]:
    kept = reduce(lambda k, e: follow(k, e, e.body), events, None)  # type: ignore[arg-type, return-value]
    assert isinstance(kept, Kept)
    found = kept.figures()
    return found.requests, found.failed, found.version


def test_counts_are_differences_since_the_first_report() -> None:
    assert figures(health(1, 100, 5), health(2, 150, 6), health(3, 200, 6)) == (100, 1, "1")


def test_a_repeated_or_reordered_event_counts_once() -> None:
    assert figures(health(1, 0), health(3, 30), health(2, 20), health(3, 30)) == (30, 0, "1")


def test_the_new_version_is_not_blamed_for_what_failed_before_it() -> None:
    events = [health(1, 0), health(2, 100, 90), health(3, 150, 120, version="2"), health(4, 250, 120, version="2")]
    assert figures(*events) == (100, 0, "2")


def test_an_agent_that_restarts_keeps_its_figures_and_starts_no_count_from_nothing() -> None:
    events = [health(1, 0), health(2, 100), health(1, 5000, boot="b", at=10), health(2, 5040, boot="b", at=11)]
    assert figures(*events) == (140, 0, "1")


def test_events_of_an_earlier_boot_that_come_late_are_passed_over() -> None:
    assert figures(health(1, 0, boot="b", at=10), health(2, 10, boot="b", at=11), health(9, 900, boot="a", at=5)) == (
        10,
        0,
        "1",
    )


def test_a_counter_that_began_anew_counts_what_it_shows() -> None:
    assert figures(health(1, 0), health(2, 100), health(3, 7)) == (107, 0, "1")


def verifier(tmp_path: Path) -> ResultVerifier:
    return ResultVerifier(CertificateAuthority.create(tmp_path / "ca", ManualClock()).certificate)


def intake(tmp_path: Path) -> tuple[Database, Intake, ManualClock]:
    database, clock = Database(f"sqlite:///{tmp_path}/fleet.db"), ManualClock(1000.0)
    database.migrate()
    with database.write() as session:
        devices.put_class(session, "x86", "{}", 1.0)
        devices.enrol(session, "b1", "x86", now=1.0)
    return database, Intake(database, clock, verifier(tmp_path)), clock


def test_nothing_is_acknowledged_that_the_database_did_not_take(tmp_path: Path) -> None:
    database, found, _ = intake(tmp_path)
    big = [
        Event(device="b1", boot="a", sequence=n, at=1.0, body=Health(model="x" * 4000, requests=n))
        for n in range(1, 200)
    ]
    database.engine.dispose()
    # To SQLite a limit on pages is a full disk.
    event.listen(database.engine, "connect", lambda c, _: c.execute("PRAGMA max_page_count = 40").fetchall())
    assert found.events(big) == []
    assert found.of("b1") is None, "figures follow what is stored"
    database.engine.dispose()
    again = Intake(Database(f"sqlite:///{tmp_path}/fleet.db"), ManualClock(), verifier(tmp_path))
    assert again.events(big) == [("b1", Ack("a", 199))]


def test_a_stale_last_will_and_a_retained_report_do_not_change_who_is_online(tmp_path: Path) -> None:
    database, found, clock = intake(tmp_path)

    def device() -> devices.Device:
        found.flush()
        with database.read() as session:
            return devices.get_device(session, "b1")

    found.presence("b1", Presence(online=True, boot="one"))
    found.presence("b1", Presence(online=True, boot="two"))
    found.presence("b1", Presence(online=False, boot="one"))
    assert device().online
    clock.advance(500)
    found.presence("b1", Presence(online=False, boot="two"))
    assert not device().online
    assert device().last_seen == 1000.0, "going away is no sign of life"


def test_a_board_whose_clock_went_back_is_heard_after_its_next_start(tmp_path: Path) -> None:
    """It has no clock of its own and is told no time, or had once been told one that is yet to come."""
    _, found, _ = intake(tmp_path)

    def requests() -> int:
        kept = found.of("b1")
        assert kept is not None
        return kept.requests

    found.presence("b1", Presence(online=True, boot="one"))
    found.events([health(1, 10, boot="one", at=4e9), health(2, 30, boot="one", at=4e9 + 10)])
    assert requests() == 20
    found.presence("b1", Presence(online=False, boot="one"))
    found.presence("b1", Presence(online=True, boot="two"))
    found.events([health(1, 500, boot="two", at=60.0), health(2, 507, boot="two", at=70.0)])
    assert requests() == 27
    found.events([health(3, 95, boot="one", at=4e9 + 20)])
    found.events([health(3, 509, boot="two", at=80.0)])
    assert requests() == 29, "what an earlier start says is earlier, whenever it comes and whatever its clock said"


def test_what_no_database_can_hold_is_passed_over_and_costs_nothing_else(tmp_path: Path) -> None:
    _, found, _ = intake(tmp_path)
    hostile = [
        health(2**63, 1),
        health(-1, 1),
        health(1, 10**30),
        health(1, 1, boot="a\x00b"),
        health(1, 1, boot=""),
        health(1, 1, boot="x" * 10_000),
        Event(device="b1", boot="a", sequence=1, at=1.0, body=Dropped(count=1, up_to=2**70)),
        Event(device="b1", boot="a", sequence=1, at=1.0, body=Dropped(count=1, up_to=0, earlier=("\x00", 5))),
        Event(device="b1", boot="a", sequence=1, at=1.0, body=Dropped(count=1, up_to=0, earlier=("b", 2**70))),
    ]
    told = Event(device="b1", boot="a", sequence=2, at=1.0, body=Refused(desired="x\x00", check="c", reason="\x00"))
    assert found.events([*hostile, health(1, 5), told]) == [("b1", Ack("a", 2))]
    found.presence("b1", Presence(online=True, boot="a\x00"))
    found.flush()
    assert found.unsound == len(hostile) + 1
