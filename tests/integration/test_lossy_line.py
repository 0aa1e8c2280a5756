"""A line that keeps the connection and loses what goes over it: what was lost goes out again, and nobody has to come."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from edgefleet_controller.transport.broker import CONTROLLER
from edgefleet_shared import mqtt, topics
from edgefleet_shared.mqtt import Link
from edgefleet_shared.topics import Kind
from support.broker import TestBroker, until
from support.line import PUBACK, PUBLISH, SUBSCRIBE, Fate, Line, Packet, as_it_is

TOPIC = topics.of_device("b1", Kind.REPORTED)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestBroker]:
    running = TestBroker(tmp_path_factory.mktemp("broker"))
    running.broker.start()
    yield running
    running.broker.stop()


class Loss:
    """Loses the first packets of a kind."""

    def __init__(self, kind: int, count: int) -> None:
        self._kind, self._left = kind, count

    def __call__(self, packet: Packet) -> Fate:
        if packet.kind == self._kind and self._left:
            self._left -= 1
        else:
            yield from as_it_is(packet)


def test_a_subscription_that_is_lost_is_made_again(broker: TestBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "ACKNOWLEDGED_S", 2.0)
    heard: set[bytes] = set()
    control = Link(broker.endpoint(CONTROLLER), CONTROLLER, on_message=lambda *_: None)
    line = Line(broker, "b2")
    line.up = Loss(SUBSCRIBE, 2)  # said at once, and with the connection
    link = Link(line.endpoint, "b2", on_message=lambda _, payload: heard.add(payload))
    link.subscribe(topics.of_device("b2", Kind.DESIRED))
    control.start()
    link.start()
    try:
        control.publish(topics.of_device("b2", Kind.DESIRED), b"wanted", retain=True)
        until(lambda: heard == {b"wanted"}, "what is wanted of the board")
    finally:
        link.stop()
        line.stop()
        control.stop()


@pytest.mark.parametrize(("lost", "count"), [(PUBLISH, 1), (PUBACK, 2 * mqtt.IN_FLIGHT)])
def test_what_is_never_acknowledged_goes_out_again(
    broker: TestBroker, monkeypatch: pytest.MonkeyPatch, lost: int, count: int
) -> None:
    monkeypatch.setattr(mqtt, "ACKNOWLEDGED_S", 2.0)
    heard: set[bytes] = set()
    control = Link(broker.endpoint(CONTROLLER), CONTROLLER, on_message=lambda _, payload: heard.add(payload))
    line = Line(broker, "b1")
    line.up, line.down = (Loss(lost, count), as_it_is) if lost == PUBLISH else (as_it_is, Loss(lost, count))
    link = Link(line.endpoint, "b1", on_message=lambda *_: None)
    control.start()
    control.subscribe(TOPIC)
    link.start()
    try:
        until(lambda: link.connected.is_set() and control.connected.is_set(), "both are connected")
        told = {b"%d" % number for number in range(3 * mqtt.IN_FLIGHT)}
        for payload in sorted(told):
            link.publish(TOPIC, payload)
        until(lambda: heard == told and not link.backlog, "all that was told")
    finally:
        link.stop()
        line.stop()
        control.stop()
