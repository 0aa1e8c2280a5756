"""The rollout service on a real database, with boards that read what is retained and report: killed anywhere, it ends the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from edgefleet_controller.rollout.fakes import read_unsigned
from edgefleet_controller.rollout.views import GateSpec, IntentKind, Phase, Rollout, Selector
from edgefleet_controller.store import devices
from edgefleet_shared.errors import ConflictError, InputError, NotFoundError
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import Event, Health, Reported, decode, encode
from support.broker import until
from support.rollout_sites import BOARDS, Site, numbered, standings
from support.simulated_boards import spec


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
