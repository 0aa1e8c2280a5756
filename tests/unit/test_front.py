"""What the front keeps of a request once it is answered or given up: nothing that the collector would have to find."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from edgefleet_agent.runtime.body_room import BodyRoom
from edgefleet_agent.runtime.exchange import Request
from edgefleet_agent.runtime.front import Front
from edgefleet_agent.runtime.head import Head
from edgefleet_agent.runtime.job import Job, Lease
from edgefleet_agent.runtime.peer import Peer
from edgefleet_agent.runtime.protocol import OutputTensor
from edgefleet_agent.runtime.regions import Regions


class Board:
    """Lends one slot and answers at once."""

    def __init__(self, size: int) -> None:
        self.slot = bytearray(size)

    def lend(self, _model: str, _version: str | None, header_length: str, _body_bytes: int) -> Lease:
        owner: Any = self
        return Lease(owner, 0, int(header_length), memoryview(self.slot))

    def give_back(self, index: int) -> None:
        pass

    def submit(self, job: Job) -> None:
        job.answer("toy", "1", [OutputTensor("y", "FP32", (1,), b"\0" * 4)])


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("given_up", [False, True])
def test_a_slot_is_let_go_with_its_request(given_up: bool) -> None:
    tensor = {"name": "x", "datatype": "UINT8", "shape": [8], "parameters": {"binary_data_size": 8}}
    header = msgspec.json.encode({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    board, head, answers = Board(len(header) + 8), Head(), []
    switchboard: Any = board
    front, peer = Front(switchboard, Regions(), dict), Peer(None)
    head.method, head.path = "POST", "/v2/models/toy/infer"
    head.inference_length, head.content_length = str(len(header)), len(board.slot)
    place = front.place(head, header, peer)
    assert place is not None
    if not given_up:
        place.view[: len(header)] = header
        request = Request(head, place.view, place, peer, BodyRoom(0))
        front.handle(request, lambda status, *_: answers.append(status) is None)
        assert answers == [200]
        del request
    place.release()
    del place
    board.slot.append(0)  # BufferError while anything looks into it
