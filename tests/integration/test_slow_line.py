"""A board behind a line that is slow: what is on its way is waited for, and not asked for again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from edgefleet_agent import settings as board_settings
from edgefleet_shared.artifact import chunk_count
from edgefleet_shared.outcomes import Outcome
from support import artifacts
from support.broker import until
from support.controller import Board, Controller
from support.line import Line


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    running = Controller(tmp_path_factory.mktemp("controller"))
    yield running
    running.stop()


def test_a_slow_line_carries_each_chunk_once(controller: Controller, tmp_path: Path) -> None:
    content = artifacts.onnx_model(1, padding_bytes=700_000)
    made = artifacts.make_artifact(controller.layout, device_class=controller.device_class, content=content)
    controller.release(made, "toy", "1")
    line = Line(controller.broker, "b1")
    board = Board(controller, "b1", tmp_path / "b1")
    settings = board_settings.read(board.state)
    board_settings.write(board.state, msgspec.structs.replace(settings, broker_port=line.port))
    board.start()
    try:
        until(lambda: "b1" in controller.reports, "the board reports")
        line.bytes_per_s = 30_000
        assert controller.outcome("b1", controller.assign("b1", made, "1")) is Outcome.SUCCEEDED
    finally:
        board.stop()
        line.stop()
    sizes = [made.size, *(blob.size for blob in controller.layout.manifest(made.digest).blobs())]
    assert controller.sender.sent_chunks == sum(map(chunk_count, sizes))
