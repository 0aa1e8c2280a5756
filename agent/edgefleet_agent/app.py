"""fleet-agent's composition root: the only module that knows every adapter. Receives a state folder, hands on a running agent."""

from __future__ import annotations

import queue
import secrets
import signal
from pathlib import Path

from edgefleet_shared import atomic, logs
from edgefleet_shared.clock import SystemClock
from edgefleet_shared.files import DISK

from edgefleet_agent import board, notify
from edgefleet_agent import settings as board_settings
from edgefleet_agent.examiner import SandboxedExaminer
from edgefleet_agent.inbox import Item
from edgefleet_agent.ports import Ports, spawn_thread
from edgefleet_agent.results import ChildSigner
from edgefleet_agent.runner import Runner
from edgefleet_agent.runtime.control import RuntimeClient, socket_path
from edgefleet_agent.transport import MqttUplink

# Chunks are 256 KiB: this bounds what a slow disk leaves waiting in memory.
INBOX_LIMIT = 12


def run(state: Path) -> None:
    """Run the agent of a board until SIGTERM.

    Raises:
        EnvironmentProblem: not enrolled. ConflictError: another agent owns the state folder.
    """
    settings = board_settings.read(state)
    with atomic.lock(state, "fleet-agent"):
        logs.configure(device=settings.device)
        inbox: queue.Queue[Item] = queue.Queue(INBOX_LIMIT)
        boot = secrets.token_hex(6)
        uplink = MqttUplink(
            settings.device,
            boot,
            board_settings.endpoint(state, settings),
            inbox.put,
            settings.api_host,
            settings.api_port,
        )
        runner = Runner(
            state,
            settings,
            board.read_fingerprint(),
            boot,
            inbox,
            Ports(
                uplink=uplink,
                runtime=RuntimeClient(socket_path(state)),
                examiner=SandboxedExaminer(),
                signer=ChildSigner(state / "identity", settings.signing_key),
                clock=SystemClock(),
                files=DISK,
                spawn=spawn_thread,
            ),
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: runner.stop())
        uplink.start()
        try:
            runner.run()
        finally:
            notify.stopping()
            uplink.stop()
