"""The real agent and the real runtime as processes, against a real broker and real signatures."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from edgefleet_agent import slots
from edgefleet_agent.slots import SlotStatus
from edgefleet_controller.results import Holder, ResultVerifier, Standing
from edgefleet_shared.artifact import MODEL_LAYER, Descriptor, digest_of
from edgefleet_shared.assignment import Subject
from edgefleet_shared.contract import AcceptanceContract, ShadowPlan, Verdict
from edgefleet_shared.fingerprint import Requirement
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import OutcomeTold
from edgefleet_shared.outcomes import Outcome
from support import artifacts
from support.broker import until
from support.controller import Board, Controller
from support.runtimes import Load


class Workshop:
    """One controller for the file, and one board, which is replaced when a test leaves it at work or dead.

    Starting an agent takes seconds: it loads every engine once. So tests share one, and each brings versions of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.controller = Controller(folder / "controller")
        self._versions = itertools.count(1)
        self._boards: list[Board] = []

    def board(self) -> Board:
        if not self._boards or not self._is_ready(self._boards[-1]):
            if self._boards:
                self._boards[-1].stop()
            name = f"b{len(self._boards) + 1}"
            self._boards.append(Board(self.controller, name, self._folder / name).start())
            until(lambda: name in self.controller.reports, "the board reports")
        return self._boards[-1]

    def _is_ready(self, board: Board) -> bool:
        runs = board.agent is not None and board.agent.poll() is None
        return runs and self.controller.reports[board.name].state is State.IDLE

    def release(self, **options: object) -> tuple[str, Descriptor]:
        version = str(next(self._versions))
        made = artifacts.make_artifact(
            self.controller.layout, version=version, device_class=self.controller.device_class,
            **{"seed": int(version)} | options,
        )  # fmt: skip
        self.controller.release(made, "toy", version)
        return version, made

    def close(self) -> None:
        for board in self._boards[-1:]:
            board.stop()
        self.controller.stop()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    made = Workshop(tmp_path_factory.mktemp("workshop"))
    yield made
    made.close()


@pytest.fixture
def board(workshop: Workshop) -> Board:
    return workshop.board()


@pytest.fixture
def controller(workshop: Workshop) -> Controller:
    return workshop.controller


@pytest.fixture
def serving(workshop: Workshop, controller: Controller, board: Board) -> str:
    """A version of the test's own, committed."""
    version, made = workshop.release()
    assert controller.outcome(board.name, controller.assign(board.name, made, version)) is Outcome.SUCCEEDED, (
        board.log()
    )
    return version


def served(board: Board) -> str:
    status = board.runtime.client.status()
    return next((v.version for v in status.versions if v.serving), "")


def test_a_board_takes_a_version_under_load_without_losing_a_request(
    workshop: Workshop, controller: Controller, board: Board, serving: str
) -> None:
    version, made = workshop.release()
    told = len(controller.outcomes_told(board.name))
    with Load(board.runtime) as load:
        load.seen(serving)
        assert controller.outcome(board.name, controller.assign(board.name, made, version)) is Outcome.SUCCEEDED
        load.seen(version)
    assert load.failed == []
    assert served(board) == version
    on_disk = slots.read(board.state)
    assert on_disk.active is not None
    assert on_disk.previous is not None
    assert (on_disk.active.version, on_disk.active.status) == (version, SlotStatus.GOOD)
    assert (on_disk.previous.version, on_disk.previous.status) == (serving, SlotStatus.GOOD)
    assert on_disk.candidate is None
    until(
        lambda: controller.outcomes_told(board.name)[told:] == [Outcome.SUCCEEDED],
        "the outcome is told once",
    )


def test_a_result_is_signed_with_the_boards_own_key_and_the_key_stays_out_of_the_agent(
    workshop: Workshop, controller: Controller, board: Board, serving: str
) -> None:
    report = controller.reports[board.name]
    verifier = ResultVerifier(controller.broker.ca.certificate)
    proof = verifier.judge(report, Holder(device=board.name, enrolled_at=0.0))
    assert (proof.standing, proof.why) == (Standing.SIGNED, "")
    for other in ({"device": "another"}, {"subject": Subject.AGENT}):
        holder = Holder(**({"device": board.name, "enrolled_at": 0.0} | other))
        assert verifier.judge(report, holder).standing is Standing.REFUSED
    told = [e.body for e in controller.events_seen if isinstance(e.body, OutcomeTold) and e.body.ended == report.ended]
    assert [body.result for body in told] == [report.result]
    assert board.agent is not None
    assert "cryptography" not in Path(f"/proc/{board.agent.pid}/maps").read_text()


def test_a_model_that_answers_wrongly_changes_nothing_and_says_why(
    workshop: Workshop, controller: Controller, board: Board, serving: str
) -> None:
    version, wrong = workshop.release(behaviour="wrong")
    assert controller.outcome(board.name, controller.assign(board.name, wrong, version)) is Outcome.FAILED_NO_CHANGE
    assert "agreement" in controller.reason(board.name)
    assert served(board) == serving
    assert slots.read(board.state).candidate is None
    assert not board.runtime.layout.has(wrong.digest), "what no slot names is collected"


def test_what_others_left_among_the_blobs_keeps_no_version_from_being_committed(
    workshop: Workshop, controller: Controller, board: Board, serving: str
) -> None:
    """A disk's own folder, one with a name that we would give a file, a note of an operator's."""
    blobs = board.runtime.layout.path(digest_of(b"")).parent
    left = [blobs / "lost+found", blobs / ".part-folder", blobs / "README"]
    left[0].mkdir()
    left[1].mkdir()
    left[2].write_text("moved here from the old card")
    version, made = workshop.release()
    try:
        assert controller.outcome(board.name, controller.assign(board.name, made, version)) is Outcome.SUCCEEDED
        assert controller.reports[board.name].problem == ""
        assert all(path.exists() for path in left)
    finally:
        left[0].rmdir()
        left[1].rmdir()
        left[2].unlink()


def test_a_release_for_another_engine_is_refused_before_download(
    workshop: Workshop, controller: Controller, board: Board
) -> None:
    sent = controller.sender.sent_chunks
    version, alien = workshop.release(requires=Requirement(arch="riscv64", engine="onnxruntime"))
    assert controller.outcome(board.name, controller.assign(board.name, alien, version)) is Outcome.REJECTED
    assert "riscv64" in controller.reason(board.name)
    assert controller.sender.sent_chunks == sent


def test_an_assignment_by_a_stranger_is_refused_and_moves_nothing(
    controller: Controller, board: Board, serving: str
) -> None:
    controller.gateway.publish_desired(board.name, b'{"signed": {}, "signatures": []}')
    until(lambda: bool(controller.reports[board.name].refusal), "the refusal is told")
    assert controller.reports[board.name].state is State.IDLE
    assert served(board) == serving


def test_one_byte_changed_on_the_senders_disk_never_becomes_a_candidate(
    workshop: Workshop, controller: Controller, board: Board
) -> None:
    version, made = workshop.release()
    sent = controller.sender.sent_chunks
    path = controller.layout.path(controller.layout.manifest(made.digest).layer(MODEL_LAYER).digest)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assignment = controller.assign(board.name, made, version)
    until(lambda: controller.sender.sent_chunks >= sent + 4, "the changed chunk went out more than once")
    assert controller.reports[board.name].state is State.FETCHING
    path.write_bytes(good)
    assert controller.outcome(board.name, assignment) is Outcome.SUCCEEDED


def test_a_deployment_that_never_gets_its_bytes_times_out(
    workshop: Workshop, controller: Controller, board: Board
) -> None:
    version, made = workshop.release()
    controller.layout.remove(controller.layout.manifest(made.digest).layer(MODEL_LAYER).digest)
    assignment = controller.assign(board.name, made, version, timeout_s=2)
    assert controller.outcome(board.name, assignment) is Outcome.TIMED_OUT


def test_a_board_that_was_off_goes_where_it_should_be_when_it_is_back(
    workshop: Workshop, controller: Controller, board: Board, serving: str
) -> None:
    board.kill_agent(signal.SIGTERM)
    until(lambda: controller.presences[board.name] is False, "it says goodbye")
    # Released while it was away: the metadata on its disk does not know them.
    second, missed = workshop.release()
    controller.assign(board.name, missed, second)
    third, made = workshop.release()
    wanted = controller.assign(board.name, made, third)
    board.start_agent()
    assert controller.outcome(board.name, wanted) is Outcome.SUCCEEDED
    assert served(board) == third
    assert not board.runtime.layout.has(missed.digest), "it reads where it should be, not what it missed"


def test_a_newer_assignment_supersedes_a_soak_and_the_board_ends_at_the_newer_one(
    workshop: Workshop, controller: Controller, board: Board, serving: str
) -> None:
    before = slots.read(board.state).active
    assert before is not None
    version, made = workshop.release()
    told = len(controller.outcomes_told(board.name))
    controller.assign(board.name, made, version, soak_s=600)
    until(lambda: controller.reports[board.name].state is State.SOAKING, "the new version soaks", 90)
    size = board.runtime.layout.path(before.manifest).stat().st_size
    back = controller.assign(board.name, Descriptor("", before.manifest, size), serving)
    assert controller.outcome(board.name, back) is Outcome.SUCCEEDED
    assert served(board) == serving
    until(lambda: Outcome.SUPERSEDED in controller.outcomes_told(board.name)[told:], "the interrupted one is told too")


def test_an_engine_that_is_killed_while_soaking_brings_the_old_version_back(
    workshop: Workshop, controller: Controller, board: Board, serving: str
) -> None:
    version, made = workshop.release()
    with Load(board.runtime) as load:
        load.seen(serving)
        assignment = controller.assign(board.name, made, version, soak_s=600)
        until(lambda: controller.reports[board.name].state is State.SOAKING, "the new version soaks", 90)
        load.seen(version)
        victim = next(v for v in board.runtime.client.status().versions if v.version == version)
        os.kill(victim.pid, signal.SIGKILL)
        assert controller.outcome(board.name, assignment) is Outcome.FAILED_ROLLED_BACK
    assert load.failed == []
    assert "SIGKILL" in controller.reason(board.name)
    assert served(board) == serving


def shadowed(**plan: object) -> AcceptanceContract:
    asked = {"requests": 40, "min_agreement": 0.95, "time_limit_s": 30.0} | plan
    return artifacts.make_contract(shadow=ShadowPlan(**asked))  # type: ignore[arg-type]


def test_a_candidate_that_agrees_on_live_requests_takes_over(
    workshop: Workshop, controller: Controller, board: Board, serving: str
) -> None:
    version, twin = workshop.release(seed=int(serving), contract=shadowed())
    with Load(board.runtime) as load:
        load.seen(serving)
        assert controller.outcome(board.name, controller.assign(board.name, twin, version)) is Outcome.SUCCEEDED
        load.seen(version)
    assert load.failed == []
    ended = controller.reports[board.name].ended
    assert ended is not None
    assert ended.acceptance is not None
    assert ended.acceptance.shadow is not None
    assert ended.acceptance.shadow.agreed >= 40
    assert board.runtime.client.status().shadow is None


def test_a_candidate_that_is_right_on_golden_pictures_and_wrong_on_live_ones_never_serves(
    workshop: Workshop, controller: Controller, board: Board, serving: str
) -> None:
    # Its golden pictures are of its own network, so acceptance passes it; the live one it sees as something else.
    live = np.random.default_rng(5).random((1, 8, 8, 3), np.float32)
    seen = artifacts.truth(int(serving), live).argmax()
    seed = next(n for n in itertools.count(1000) if artifacts.truth(n, live).argmax() != seen)
    version, other = workshop.release(seed=seed, contract=shadowed())
    with Load(board.runtime, x=live) as load:
        load.seen(serving)
        outcome = controller.outcome(board.name, controller.assign(board.name, other, version))
        load.seen(serving)
    assert outcome is Outcome.FAILED_NO_CHANGE
    assert "shadow_agreement" in controller.reason(board.name)
    assert load.failed == []
    assert set(load.answers) == {serving}
    assert served(board) == serving


def test_the_first_model_of_a_board_has_nothing_to_follow_and_the_report_says_so(
    workshop: Workshop, controller: Controller, tmp_path: Path
) -> None:
    version, made = workshop.release(contract=shadowed())
    fresh = Board(controller, "fresh", tmp_path / "fresh").start()
    try:
        assert controller.outcome(fresh.name, controller.assign(fresh.name, made, version)) is Outcome.SUCCEEDED
        ended = controller.reports[fresh.name].ended
        assert ended is not None
        assert ended.acceptance is not None
        assert any("nothing serves" in told for told in ended.acceptance.unmeasured)
    finally:
        fresh.stop()


def test_without_live_requests_nothing_is_known_and_nothing_changes(
    workshop: Workshop, controller: Controller, board: Board, serving: str
) -> None:
    version, twin = workshop.release(seed=int(serving), contract=shadowed(time_limit_s=2.0))
    assert controller.outcome(board.name, controller.assign(board.name, twin, version)) is Outcome.FAILED_NO_CHANGE
    ended = controller.reports[board.name].ended
    assert ended is not None
    assert ended.acceptance is not None
    assert ended.acceptance.verdict is Verdict.INCONCLUSIVE
    assert served(board) == serving


@pytest.mark.parametrize("state", [State.FETCHING, State.VERIFYING, State.ACCEPTING, State.SWAPPING, State.SOAKING])
def test_an_agent_that_is_killed_in_any_state_ends_where_it_should(
    workshop: Workshop, controller: Controller, board: Board, serving: str, state: State
) -> None:
    version, made = workshop.release()
    if state is State.FETCHING:
        controller.sender.stop()
    assignment = controller.assign(board.name, made, version, soak_s=2)
    journal = board.state / "journal.json"
    until(lambda: f'"state":"{state.value}"' in journal.read_text(), f"it is {state.value}")
    board.kill_agent()
    assert served(board) in (serving, version)
    if state is State.FETCHING:
        controller.start_sender()
    board.start_agent()
    assert controller.outcome(board.name, assignment) is Outcome.SUCCEEDED
    assert served(board) == version


DEAF = """
import sys
from pathlib import Path
from edgefleet_agent import app, transport
def parse(topic):
    raise MemoryError
transport.topics.parse = parse
app.run(Path(sys.argv[1]))
"""


def test_an_agent_whose_connection_breaks_within_ends_and_is_not_left_deaf(
    controller: Controller, tmp_path: Path
) -> None:
    """Whoever keeps it running starts it again; it would have looked alive to him for ever."""
    deaf = Board(controller, "deaf", tmp_path / "deaf")
    ended = subprocess.run(
        [sys.executable, "-c", DEAF, str(deaf.state)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "MemoryError" in ended.stderr


def test_a_second_agent_on_one_state_folder_is_refused(board: Board) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "edgefleet_agent.cli", "run", "--state", str(board.state)],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert second.returncode == 1
    assert "in use by fleet-agent, pid" in second.stderr
    assert board.agent is not None
    assert board.agent.poll() is None
