"""What the board's end of MQTT keeps in memory while nobody takes it: nothing that is said again anyhow."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgefleet_agent.spool import WINDOW
from edgefleet_agent.transport import MqttUplink
from edgefleet_shared import mqtt
from edgefleet_shared.fingerprint import Fingerprint
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import Reported
from support.broker import TestBroker

BOARD = Fingerprint(arch="x86_64", cpu_features=(), engines={}, memory_bytes=1 << 30, agent_version="0")
REPORT = Reported(
    device="b1", device_class="c", boot="b", at=0.0, state=State.IDLE, agent_version="0", fingerprint=BOARD
)


@pytest.fixture
def uplink(tmp_path: Path) -> MqttUplink:
    """One without a line."""
    return MqttUplink("b1", "boot", TestBroker(tmp_path).endpoint("b1"), lambda item: None, "", 0)


def test_a_board_whose_problems_come_and_go_through_months_without_a_line_keeps_no_reports(uplink: MqttUplink) -> None:
    for _ in range(mqtt.OUTBOX_LIMIT + 1):
        uplink.report(REPORT)
    assert uplink.backlog == 0


def test_a_broker_that_takes_nothing_more_is_not_waited_for_with_ever_more_copies(uplink: MqttUplink) -> None:
    for _ in range(mqtt.OUTBOX_LIMIT + 1):
        uplink.event(b"an event that the spool keeps and sends again")
    assert 2 * WINDOW < uplink.backlog < 8 * WINDOW
