"""Stage 5, transport: the supervised mosquitto. Receives certificates and a port, hands on a running broker.

No broker on PyPI is fit (ADR 0001), so the embedded default is Debian's mosquitto, configured and restarted from here. The
access rules are made from :data:`edgefleet_shared.topics.TABLE`: who a client is comes from its certificate alone, and it can
speak only below its own name.
"""

from __future__ import annotations

import logging
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import msgspec
from edgefleet_shared import atomic, topics
from edgefleet_shared.errors import EnvironmentProblem

log = logging.getLogger(__name__)

CONTROLLER = "edgefleet-controller"  # the certificate name that may read and write everything
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0


class BrokerFiles(msgspec.Struct, frozen=True, kw_only=True):
    """What the broker needs on disk. ``folder`` is its own."""

    folder: Path
    ca: Path
    certificate: Path
    key: Path


def find_mosquitto() -> str:
    """The broker's program.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    found = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise EnvironmentProblem(
            "the MQTT broker mosquitto is not installed",
            hint="install the Debian package mosquitto (2.0 or newer), or set EDGEFLEET_BROKER to an external broker",
        )
    return found


def install_mosquitto() -> None:
    """Install the broker if it is missing and we may.

    Raises:
        EnvironmentProblem: it is missing, and there is no right or no way to install it.
    """
    try:
        find_mosquitto()
        return
    except EnvironmentProblem as missing:
        apt = shutil.which("apt-get")
        sudo = shutil.which("sudo")
        prefix: list[str] | None = [] if os.geteuid() == 0 else None
        if prefix is None and sudo and subprocess.run([sudo, "-n", "true"], capture_output=True).returncode == 0:
            prefix = [sudo, "-n"]
        if apt is None or prefix is None:
            raise EnvironmentProblem(
                f"{missing.message}, and there is no right to install it here",
                hint="ask for the Debian package mosquitto, or run this as root",
            ) from missing
    # Debian would start a broker of its own on port 1883, which nobody asked for.
    environment = [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1"]
    for command in ([apt, "-qq", "update"], [apt, "-qq", "install", "-y", "--no-install-recommends", "mosquitto"]):
        done = subprocess.run([*environment, *command], capture_output=True, text=True)
        if done.returncode and command[2] == "install":
            raise EnvironmentProblem(
                f"installing mosquitto failed: {done.stderr.strip()[-300:]}", hint="install it by hand, then try again"
            )
    find_mosquitto()


def access_rules() -> str:
    """mosquitto's ACL file: the controller may everything, a board only what the topic table gives it."""
    lines = [f"user {CONTROLLER}", f"topic readwrite {topics.PREFIX}/#", ""]
    for row in topics.TABLE:
        right = "write" if row.from_device else "read"
        pattern = row.pattern.replace("<device>", "%u").replace("<sha256 hex>", "+").replace("<n>", "+")
        pattern = pattern.replace("<metadata file>", "+")
        lines.append(f"pattern {right} {topics.PREFIX}/{pattern}")
    return "\n".join(lines) + "\n"


def configuration(files: BrokerFiles, host: str, port: int) -> str:
    """mosquitto.conf. Each limit says why it is not the default."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    return f"""# Written by fleet serve at each start: changes here are lost.
per_listener_settings false
user {user}
listener {port} {host}
cafile {files.ca}
certfile {files.certificate}
keyfile {files.key}
tls_version tlsv1.2
require_certificate true
use_identity_as_username true
# Else a board with a valid certificate kicks another one off by taking its client id.
use_username_as_clientid true
allow_anonymous false
acl_file {files.folder / "acl"}
persistence true
persistence_location {files.folder}/
autosave_interval 60
persistent_client_expiration 14d
max_inflight_messages 1000
# The default of 1000 drops silently when a subscriber lags.
max_queued_messages 100000
max_packet_size 1048576
log_dest stderr
log_type error
log_type warning
log_type notice
connection_messages false
"""


def write_settings(files: BrokerFiles, host: str, port: int) -> None:
    """Write access rules and configuration; the latter last, because who waits for it may start at once.

    Raises:
        EnvironmentProblem: the folder can't be written.
    """
    atomic.make_folder(files.folder, 0o700)
    atomic.write(files.folder / "acl", access_rules().encode(), 0o600)
    atomic.write(files.folder / "mosquitto.conf", configuration(files, host, port).encode(), 0o600)


class Broker:
    """A mosquitto process that is started, watched and restarted.

    Args:
        host, port: where it listens.
    """

    def __init__(self, files: BrokerFiles, host: str, port: int) -> None:
        self._files, self.host, self.port = files, host, port
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None
        self.restarts = 0

    def start(self) -> None:
        """Start it and return when it listens.

        Raises:
            EnvironmentProblem: not installed, port taken, or it ends at once (its last words in the message).
        """
        program = find_mosquitto()
        write_settings(self._files, self.host, self.port)
        self._end_orphan()
        self._refuse_taken_port()
        self._launch(program)
        self._wait_until_up()
        self._watcher = threading.Thread(target=self._watch, args=(program,), name="broker-watch", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        self._stopping.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._watcher is not None:
            self._watcher.join(5)

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    @property
    def log(self) -> Path:
        return self._files.folder / "mosquitto.log"

    def _launch(self, program: str) -> None:
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [program, "-c", str(self._files.folder / "mosquitto.conf")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            atomic.write(self._pid_file, f"{self._process.pid}\n".encode())
        except EnvironmentProblem as exc:
            # The broker runs; only a controller that is killed while the disk is full leaves it to a person to end.
            log.warning("broker pid not noted", extra={"reason": str(exc)})

    @property
    def _pid_file(self) -> Path:
        return self._files.folder / "mosquitto.pid"

    def _end_orphan(self) -> None:
        """End the broker of a controller that was killed: it holds our port and our store. The caller owns the folder, so no
        living controller can want it; that the process is ours is known by its command line."""
        try:
            pid = int(self._pid_file.read_text())
            handle = os.pidfd_open(pid)
        except (OSError, ValueError):
            return  # no file, or no such process
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if str(self._files.folder / "mosquitto.conf").encode() in line:
                for number in (signal.SIGTERM, signal.SIGKILL):
                    signal.pidfd_send_signal(handle, number)
                    if select.select([handle], [], [], STOP_TIMEOUT_S)[0]:
                        break
        except (FileNotFoundError, ProcessLookupError):
            return  # it ended meanwhile
        finally:
            os.close(handle)

    def _refuse_taken_port(self) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as exc:
                raise EnvironmentProblem(
                    f"the broker can't listen on {self.host}:{self.port}: {exc.strerror}",
                    hint="choose another port in controller.yaml (broker_port), or stop what listens there",
                ) from exc

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                raise EnvironmentProblem(f"the broker ended at its start: {self._last_words()}")
            try:
                socket.create_connection((self.host, self.port), 0.5).close()
                return
            except OSError:
                self._stopping.wait(0.05)
        raise EnvironmentProblem(f"the broker did not listen within {START_TIMEOUT_S:.0f} s: {self._last_words()}")

    def _last_words(self) -> str:
        text = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return " / ".join(text[-3:]) or "it said nothing"

    def _watch(self, program: str) -> None:
        while not self._stopping.is_set():
            assert self._process is not None
            try:
                self._process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
            if not self._stopping.is_set():
                self.restarts += 1
                self._stopping.wait(min(0.2 * self.restarts, 5.0))
                if not self._stopping.is_set():
                    self._launch(program)
