"""A board on which no further process or thread may be started, by a control group with a limit of tasks: that is its want, and no model's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from support import control_group
from support.control_group import Tasks
from support.runtimes import gateway, running


@pytest.fixture
def group() -> Iterator[Tasks]:
    with control_group.made_for_tasks() as made:
        yield made


def test_the_grpc_gateway_answers_on_where_no_thread_can_be_started(group: Tasks, tmp_path: Path) -> None:
    with running(tmp_path) as runtime:
        runtime.install(runtime.add("1"))
        runtime.start()
        with gateway(runtime) as (address, process):
            group.take_in(process.pid)
            group.leave(0)
            with grpc.insecure_channel(address) as channel:
                live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
                answers = [live.future(b"", timeout=20) for _ in range(8)]
                assert {answer.result() for answer in answers} == {b"\x08\x01"}
