"""The agent updates itself: the real launcher, agent and runtime as processes, a real broker, real signatures, versions that fail in every way."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from edgefleet_agent import launcher, slots, verify
from edgefleet_agent.launcher import STARTS
from edgefleet_controller.results import Holder, ResultVerifier, Standing
from edgefleet_shared.artifact import MODEL_LAYER, Descriptor
from edgefleet_shared.assignment import AGENT, Subject
from edgefleet_shared.lifecycle import State
from edgefleet_shared.outcomes import Outcome
from support import agents, artifacts
from support.agents import LaunchedBoard
from support.broker import until
from support.controller import Controller
from support.runtimes import Load

TIMEOUT_S = 180  # of an assignment: a sixth of it is what a version has to prove itself, on a busy machine

UPDATE_S = 8.0  # an update takes about this long: the span in which a random kill falls

Make = Callable[..., tuple[str, Descriptor]]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return agents.wheels(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    made = Controller(tmp_path_factory.mktemp("controller"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def board(controller: Controller, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedBoard]:
    """A board that serves a model and runs the agent of its package."""
    made = LaunchedBoard(controller, "b1", tmp_path_factory.mktemp("b1"))
    made.start()
    try:
        until(lambda: "b1" in controller.reports, "the board reports", 60)
        model = artifacts.make_artifact(controller.layout, version="1", seed=1, device_class=controller.device_class)
        controller.release(model, "toy", "1")
        assert controller.outcome("b1", controller.assign("b1", model, "1")) is Outcome.SUCCEEDED, made.log()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def make(controller: Controller, wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make a released version of the agent, with one line of it changed."""
    numbers = itertools.count(1)

    def made(file: str = "", old: str = "", new: str = "", metadata: str = "") -> tuple[str, Descriptor]:
        version = f"0.2.{next(numbers)}"
        folder = tmp_path_factory.mktemp("versions") / version
        return version, agents.release(controller, agents.changed(wheels, folder, version, file, old, new, metadata))

    return made


def assign(controller: Controller, made: tuple[str, Descriptor], timeout_s: int = TIMEOUT_S) -> str:
    version, manifest = made
    return controller.assign("b1", manifest, version, model=AGENT, soak_s=0, timeout_s=timeout_s)


def rests(board: LaunchedBoard) -> None:
    """What a failed update leaves: the version that the slots say runs, nothing of the other one is left."""
    found = slots.read(launcher.folder(board.state))
    active = found.active.manifest if found.active else ""
    until(lambda: board.told.running == active and board.told.state is State.IDLE, "the version before runs", 60)
    assert found.candidate is None


def check_signed(controller: Controller, board: LaunchedBoard) -> None:
    """What the board says last of its agent is its own signed word, and nobody else's."""
    verifier = ResultVerifier(controller.broker.ca.certificate)
    own = Holder(device="b1", enrolled_at=0.0, subject=Subject.AGENT)
    proof = verifier.judge(board.told, own)
    assert (proof.standing, proof.why) == (Standing.SIGNED, "")
    for other in ({"device": "b2"}, {"subject": Subject.MODEL}):
        assert verifier.judge(board.told, msgspec.structs.replace(own, **other)).standing is Standing.REFUSED


def test_a_good_version_runs_and_is_committed_while_the_model_serves_on(controller, board, make) -> None:
    first, second = make(), make()
    with Load(board.runtime) as load:
        for version, manifest in (first, second):
            assert board.outcome(assign(controller, (version, manifest))) is Outcome.SUCCEEDED, board.log()[-3000:]
            assert board.version() == version
            assert board.told.running == manifest.digest
            assert board.told.active is not None
            assert (board.told.active.version, board.told.active.status) == (version, "good")
            check_signed(controller, board)
        load.seen("1")
    assert load.failed == []
    assert "cryptography" not in Path(f"/proc/{board.pid}/maps").read_text()
    assert board.told.previous is not None
    assert board.told.previous.version == first[0]


def test_a_version_that_runs_out_of_its_zip_takes_a_model_as_any_other(controller, board, make) -> None:
    assert board.outcome(assign(controller, make())) is Outcome.SUCCEEDED
    model = artifacts.make_artifact(controller.layout, version="2", seed=2, device_class=controller.device_class)
    controller.release(model, "toy", "2")
    assert controller.outcome("b1", controller.assign("b1", model, "2")) is Outcome.SUCCEEDED, board.log()[-3000:]
    report = controller.reports["b1"].ended
    assert report is not None
    assert report.acceptance is not None
    assert report.acceptance.unconfined == ()


def test_a_version_that_dies_on_its_trial_costs_no_model_that_is_on_its_way(controller, board, make) -> None:
    model = artifacts.make_artifact(controller.layout, version="3", seed=3, device_class=controller.device_class)
    controller.release(model, "toy", "3")
    weights = controller.layout.path(controller.layout.manifest(model.digest).layer(MODEL_LAYER).digest)
    held = weights.rename(weights.with_name("..held"))
    on_its_way = controller.assign("b1", model, "3")
    until(lambda: controller.reports["b1"].state is State.FETCHING, "the model is being fetched")

    anchor = "        if not self._line_is_up():"
    made = make("edgefleet_agent/selfupdate.py", anchor, "        import os\n\n        os._exit(3)\n" + anchor)
    assert board.outcome(assign(controller, made)) is Outcome.FAILED_ROLLED_BACK
    rests(board)
    assert controller.reports["b1"].state is State.FETCHING

    held.rename(weights)
    assert controller.outcome("b1", on_its_way) is Outcome.SUCCEEDED, board.log()[-3000:]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_is_killed_at_random_moments_of_its_update_and_ends_as_it_says(controller, board, make, seed) -> None:
    chance = random.Random(seed)
    before, made = board.version(), make()
    assignment = assign(controller, made)
    for _ in range(2):
        time.sleep(chance.uniform(0, UPDATE_S))
        board.kill_agent()
    told = board.outcome(assignment)
    rests(board)
    assert told in (Outcome.SUCCEEDED, Outcome.FAILED_ROLLED_BACK)
    check_signed(controller, board)
    assert board.version() == (made[0] if told is Outcome.SUCCEEDED else before)


def test_it_is_killed_and_comes_back_as_the_version_that_was_committed(controller, board, make) -> None:
    made = make()
    assert board.outcome(assign(controller, made)) is Outcome.SUCCEEDED
    boot = controller.reports["b1"].boot
    board.kill_agent()
    until(lambda: controller.reports["b1"].boot != boot, "the agent is back", 60)
    assert board.version() == made[0]


@pytest.mark.parametrize(
    ("new", "timeout_s", "why"),
    [
        ('    raise RuntimeError("planted")\n', TIMEOUT_S, f"it was started {STARTS} times"),
        ("    return\n", TIMEOUT_S, f"it was started {STARTS} times"),
        ("    import time\n    time.sleep(3600)\n", 30, f"it was started {STARTS} times"),
        (
            "    import os, signal\n    os.kill(os.getpid(), signal.SIGSEGV)\n",
            TIMEOUT_S,
            f"it was started {STARTS} times",
        ),
    ],
    ids=["raises", "ends with 0", "hangs", "segfaults"],
)
def test_a_version_that_does_not_come_up_is_left_for_the_one_before(
    controller, board, make, new, timeout_s, why
) -> None:
    before = board.version()
    anchor = "    settings = board_settings.read(state)\n"
    made = make("edgefleet_agent/app.py", anchor, new + anchor)
    assert board.outcome(assign(controller, made, timeout_s), 180) is Outcome.FAILED_ROLLED_BACK
    assert board.told.ended is not None
    assert why in board.told.ended.reason
    check_signed(controller, board)
    rests(board)
    assert board.version() == before


def test_one_that_dies_between_the_end_of_its_trial_and_the_signature_has_it_signed_by_the_next_start(
    controller, board, make
) -> None:
    anchor = '        ended = sandbox.run("edgefleet_agent.sign_child"'
    die_once = """        import os
        if not (once := self._identity.parent / "died-once").exists():
            once.touch()
            os.kill(os.getpid(), 9)
"""
    made = make("edgefleet_agent/results.py", anchor, die_once + anchor)
    starts = board.starts
    assert board.outcome(assign(controller, made)) is Outcome.SUCCEEDED, board.log()[-3000:]
    assert (board.state / "died-once").exists()
    assert board.starts == starts + 2
    check_signed(controller, board)


def test_a_version_that_can_not_reach_the_broker_returns_by_itself_and_the_one_before_says_so(
    controller, board, make
) -> None:
    before = board.version()
    made = make(
        "edgefleet_agent/settings.py", "        port=settings.broker_port,", "        port=settings.broker_port - 1,"
    )
    assert board.outcome(assign(controller, made, 60), 180) is Outcome.FAILED_ROLLED_BACK
    assert board.told.ended is not None
    assert "the broker was not reached" in board.told.ended.reason
    rests(board)
    assert board.version() == before


@pytest.mark.parametrize(
    ("file", "old", "new", "why"),
    [
        ("edgefleet_agent/cli.py", "import os\n", "import nothing_of_that_name\n", "nothing_of_that_name"),
        ("edgefleet_agent/journal.py", "    path = state / \"journal.json\"\n", "    raise ValueError('unreadable')\n    path = state\n", "unreadable"),
        ("edgefleet_agent/__init__.py", "__version__ = ", "__version__ = 'another' + ", "it calls itself another"),
    ],
    ids=["import", "state", "name"],
)  # fmt: skip
def test_a_version_that_fails_its_rehearsal_is_never_started(controller, board, make, file, old, new, why) -> None:
    starts = board.starts
    assert board.outcome(assign(controller, make(file, old, new))) is Outcome.FAILED_NO_CHANGE
    assert board.told.ended is not None
    assert why in board.told.ended.reason
    assert board.starts == starts


def test_a_version_that_needs_more_than_the_package_has_is_refused_before_a_byte_is_fetched(
    controller, board, make
) -> None:
    made = make(metadata="Requires-Dist: msgspec>=99\nRequires-Dist: never-heard-of-it>=1\n")
    sent = controller.sender.sent_bytes
    assert board.outcome(assign(controller, made)) is Outcome.REJECTED
    assert board.told.ended is not None
    assert "needs msgspec >=99" in board.told.ended.reason.replace(">=0.19,", "")
    assert "needs never-heard-of-it >=1 of the board's package, which has none" in board.told.ended.reason
    assert controller.sender.sent_bytes == sent


def test_attack_a_version_that_nobody_released_is_refused(controller, board, wheels, tmp_path) -> None:
    sources = agents.changed(wheels, tmp_path / "unsigned", "0.9.9")
    (digest,) = agents.agent_version.build(sources, [controller.device_class], controller.layout)
    unsigned = Descriptor("", digest, controller.layout.path(digest).stat().st_size)
    assert board.outcome(assign(controller, ("0.9.9", unsigned))) is Outcome.REJECTED
    assert board.told.ended is not None
    assert "agreement" in board.told.ended.reason


def test_attack_another_artifact_under_a_released_version_is_refused(controller, board, make, wheels, tmp_path) -> None:
    version, _ = make()
    sources = agents.changed(
        wheels, tmp_path / "other", version, "edgefleet_agent/notify.py", "import os\n", "import os  # hostile\n"
    )
    (digest,) = agents.agent_version.build(sources, [controller.device_class], controller.layout)
    other = Descriptor("", digest, controller.layout.path(digest).stat().st_size)
    assert board.outcome(assign(controller, (version, other))) is Outcome.REJECTED


def test_attack_an_older_assignment_replayed_brings_no_older_version_back(controller, board, make) -> None:
    captured: list[bytes] = []
    sign = controller.signed
    controller.signed = lambda assignment: captured.append(sign(assignment)) or captured[-1]
    try:
        for made in (make(), make()):
            assert board.outcome(assign(controller, made)) is Outcome.SUCCEEDED
    finally:
        controller.signed = sign
    floor = verify.read_floors(board.state).agent_version
    controller.gateway.publish_desired_agent("b1", captured[0])
    until(lambda: "assignment_fresh" in board.told.refusal, "the replay is refused", 60)
    assert board.version() == made[0]
    assert verify.read_floors(board.state).agent_version == floor


def test_attack_an_assignment_on_the_other_ones_topic_is_refused(controller, board, make) -> None:
    captured: list[bytes] = []
    version, manifest = make()
    sign = controller.signed
    controller.signed = lambda assignment: captured.append(sign(assignment)) or captured[-1]
    publish = controller.gateway.publish_desired_agent
    controller.gateway.publish_desired_agent = lambda device, content: None
    try:
        assign(controller, (version, manifest))
    finally:
        controller.signed, controller.gateway.publish_desired_agent = sign, publish
    controller.gateway.publish_desired("b1", captured[0])
    until(lambda: "assignment_device" in controller.reports["b1"].refusal, "it is refused", 60)
    assert controller.reports["b1"].active is not None
    assert controller.reports["b1"].active.model == "toy"


def test_a_board_without_the_launcher_says_so_and_changes_nothing(controller, make, tmp_path) -> None:
    from support.controller import Board

    alone = Board(controller, "alone", tmp_path / "alone").start()
    try:
        until(lambda: "alone" in controller.reports, "the board reports", 60)
        version, manifest = make()
        controller.assign("alone", manifest, version, model=AGENT)

        def refused() -> bool:
            told = controller.reports["alone"].agent
            return told is not None and "needs launcher" in told.refusal

        until(refused, "the refusal is told", 60)
    finally:
        alone.stop()
