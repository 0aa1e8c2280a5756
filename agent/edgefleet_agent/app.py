"""fleet-agent's composition root: the only module that knows every adapter. Receives a state folder, hands on a running agent."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

from edgefleet_shared import atomic, logs, threads
from edgefleet_shared.assignment import Subject
from edgefleet_shared.clock import SystemClock
from edgefleet_shared.errors import EnvironmentProblem
from edgefleet_shared.faces import told
from edgefleet_shared.files import DISK
from edgefleet_shared.fingerprint import Fingerprint

from edgefleet_agent import __version__, board, launcher, notify
from edgefleet_agent import settings as board_settings
from edgefleet_agent.examiner import SandboxedExaminer
from edgefleet_agent.inbox import Item
from edgefleet_agent.line import Line
from edgefleet_agent.ports import Ports
from edgefleet_agent.rehearse import AgentExaminer
from edgefleet_agent.renewal import ChildRenewer, Renewal
from edgefleet_agent.results import ChildSigner
from edgefleet_agent.runner import Runner
from edgefleet_agent.runtime.control import RuntimeClient, socket_path
from edgefleet_agent.selfupdate import AgentEffects, AgentUplink, Fork, Myself, Proof
from edgefleet_agent.settings import Settings
from edgefleet_agent.transport import MqttUplink

# Chunks are 256 KiB: this bounds what a slow disk leaves waiting in memory.
INBOX_LIMIT = 12


class Agent:
    """Both lines of a board, the model's and the agent's own, on one thread and one connection.

    Args:
        manifest: of the version that runs, as the launcher said; empty for the package's; None without a launcher.
        package: the package's version.
    """

    def __init__(self, state: Path, settings: Settings, found: Fingerprint, manifest: str | None, package: str) -> None:
        inbox: queue.Queue[Item] = queue.Queue(INBOX_LIMIT)
        self._own_inbox: queue.Queue[Item] = queue.Queue(INBOX_LIMIT)
        boot = os.urandom(6).hex()
        fork = Fork(inbox.put, self._own_inbox.put)
        self._uplink = MqttUplink(
            settings.device,
            boot,
            board_settings.endpoint(state, settings),
            fork.put,
            settings.api_host,
            settings.api_port,
        )
        ports = Ports(
            uplink=self._uplink,
            runtime=RuntimeClient(socket_path(state)),
            examiner=SandboxedExaminer(),
            signer=ChildSigner(state / "identity", settings.signing_key),
            clock=SystemClock(),
            files=DISK,
            spawn=threads.spawn,
        )
        self._state, self._manifest, self._clock = state, manifest or "", ports.clock
        deciding, kernel_boot = threading.Lock(), board.kernel_boot()
        self._renewal = Renewal(
            state, ChildRenewer(state, settings), ports, lambda problem: self._models.note("certificate", problem)
        )
        self._models = Runner(
            state, settings, found, boot, inbox, ports,
            Line(may_begin=lambda: not self._own.changes, excused=lambda: self._own.is_changing, deciding=deciding),
            kernel_boot,
        )  # fmt: skip
        myself = Myself(
            manifest=manifest or "",
            launched=manifest is not None,
            package=package,
            home=state,
            unproven=Proof(lambda: fork.up, lambda: self._own.unverified(), ports),
            models_rest=lambda: not self._models.changes,
            restart=self.stop,
            proven=_disarm,
        )
        self._own = Runner(
            launcher.folder(state),
            settings,
            found,
            f"{boot}a",
            self._own_inbox,
            ports._replace(
                uplink=AgentUplink(self._uplink, manifest or "", self._uplink.tell_agent), examiner=AgentExaminer(state)
            ),
            Line(subject=Subject.AGENT, home=state, effects=partial(AgentEffects, myself=myself), deciding=deciding),
            kernel_boot,
        )

    def run(self) -> None:
        """Until :meth:`stop`.

        Raises:
            EnvironmentProblem: the board has no room for the threads. No start is counted then, which would be held against what is tried.
        """
        self._settles_at = self._clock.monotonic() + launcher.SETTLED_S
        self._uplink.start()
        try:
            self._models.watch_health()
            self._own.turn(None)  # first: the model's line asks whether this start is its doing
            self._models.run(beside=self._turn_own)
        finally:
            notify.stopping()
            self._uplink.stop()

    def stop(self) -> None:
        """Safe in a signal handler and on any thread."""
        self._models.stop()

    def _turn_own(self) -> None:
        self._renewal.turn()
        while True:
            try:
                item = self._own_inbox.get_nowait()
            except queue.Empty:
                self._own.turn(None)
                break
            self._own.turn(item)
        if self._clock.monotonic() >= self._settles_at:
            self._settles_at = self._clock.monotonic() + launcher.SETTLED_S
            with suppress(EnvironmentProblem):  # a disk that refuses is asked again
                launcher.settle(self._state, self._manifest)


def _disarm() -> None:
    """The launcher's alarm: this version has proven itself."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def run(state: Path) -> None:
    """Run the agent of a board until SIGTERM, or until the launcher is to start another version.

    Raises:
        EnvironmentProblem: not enrolled. TransportError: its certificate can't be used. ConflictError: another agent owns the state folder.
    """
    settings = board_settings.read(state)
    # First: loading every engine, to see what the board has, is not for an agent that is started in vain every few seconds.
    board_settings.endpoint(state, settings).tls()
    with atomic.lock(state, "fleet-agent"):
        logs.configure(device=settings.device)
        agent = Agent(
            state,
            settings,
            board.read_fingerprint(),
            os.environ.get(launcher.MANIFEST_VARIABLE),
            os.environ.get(launcher.PACKAGE_VARIABLE, __version__),
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: agent.stop())
        # Memory that was not there, or a bug: the next start counts against what it was at (lifecycle.py).
        threading.excepthook = threads.end_with
        agent.run()


@told
def main() -> None:
    """The program; its argument is the state folder."""
    run(Path(sys.argv[1]))
