"""docker-compose.yml as docker-compose itself reads it; no engine is needed for that."""

from __future__ import annotations

import os
import select
import shutil
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from edgefleet_controller.home import create
from edgefleet_controller.transport.broker import CONTROLLER, find_mosquitto
from edgefleet_shared.clock import SystemClock

ROOT = Path(__file__).resolve().parents[2]
BOARDS = ("board-1", "board-2")
OURS = {"broker", "controller", *(f"{board}-{part}" for board in BOARDS for part in ("agent", "runtime"))}


def compose_command() -> list[str] | None:
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if shutil.which("docker"):
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=30)
        if plugin.returncode == 0:
            return ["docker", "compose"]
    return None


COMPOSE = compose_command()
pytestmark = pytest.mark.skipif(
    COMPOSE is None, reason="neither docker-compose nor docker's compose plugin is installed"
)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    assert COMPOSE is not None
    done = subprocess.run(
        [*COMPOSE, "--project-directory", str(ROOT), "-f", str(ROOT / "docker-compose.yml"), "config"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    parsed: dict[str, Any] = yaml.safe_load(done.stdout)
    return parsed


def test_broker_database_controller_and_two_boards_are_there(config):
    assert set(config["services"]) == OURS | {"postgresql"}


def test_every_service_says_whether_it_is_alive_and_comes_back(config):
    for name, service in config["services"].items():
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["restart"] == "unless-stopped", name


def test_ours_run_without_capabilities_on_a_read_only_file_system(config):
    for name in OURS:
        service = config["services"][name]
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name


def test_secrets_are_files_that_git_ignores_and_no_variable_holds_one(config):
    for secret in config["secrets"].values():
        path = Path(secret["file"])
        ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", str(path)], timeout=30)
        assert ignored.returncode == 0, path
    for name, service in config["services"].items():
        for variable, value in (service.get("environment") or {}).items():
            if any(word in variable for word in ("PASSWORD", "TOKEN", "SECRET", "KEY")):
                assert variable.endswith("_FILE"), (name, variable)
                assert str(value).startswith("/run/secrets/"), (name, variable)
            assert "@" not in str(value) or ":" not in str(value).partition("//")[2].partition("@")[0], (name, variable)


def test_nothing_is_published_beyond_this_machine(config):
    for name, service in config["services"].items():
        for port in service.get("ports", ()):
            host = port.get("host_ip") if isinstance(port, dict) else str(port).split(":")[0]
            assert host == "127.0.0.1", (name, port)


def test_the_database_is_out_of_the_boards_reach(config):
    networks = {name: set(service.get("networks") or ()) for name, service in config["services"].items()}
    assert networks["postgresql"] == {"store"}
    assert networks["controller"] >= {"store", "boards"}
    for board in BOARDS:
        assert networks[f"{board}-agent"] == {"boards"}


def test_a_runtime_has_no_network_and_shares_state_with_its_own_agent_only(config):
    def volumes(service: str) -> set[str]:
        entries = config["services"][service]["volumes"]
        return {e["source"] if isinstance(e, dict) else e.split(":")[0] for e in entries}

    for board in BOARDS:
        runtime = config["services"][f"{board}-runtime"]
        assert runtime["network_mode"] == "none"
        assert not runtime.get("depends_on")
        assert volumes(f"{board}-runtime") == volumes(f"{board}-agent") == {f"{board}-state", f"{board}-run"}


def test_every_image_of_ours_is_built_from_hashed_locks_and_runs_as_an_ordinary_user(config):
    for name in OURS:
        build = config["services"][name].get("build")
        if build is None:
            assert name.endswith("-agent"), name  # the same image as its runtime
            continue
        text = (ROOT / build["dockerfile"]).read_text()
        users = [line.split()[1] for line in text.splitlines() if line.startswith("USER ")]
        assert users[-1:] == ["edgefleet"], name
        for line in text.splitlines():
            if " install " in line and "pip" in line:
                assert "--require-hashes" in line or "--no-index" in line, line


def test_the_broker_runs_on_what_the_controllers_container_writes_for_it(tmp_path):
    """The two containers' own scripts, on this machine: settings are written, mosquitto takes them and shows the fleet's certificate."""
    home = tmp_path / "home"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"EDGEFLEET_HOME": str(home), "EDGEFLEET_BROKER": f"broker:{port}"}
    made = create(
        home, listen="0.0.0.0:8443", public_url="https://controller:8443", broker_host="broker", broker_port=8883,
        hosts=(), signers=1, threshold=1, clock=SystemClock(),
    )  # fmt: skip
    assert made.home == home
    subprocess.run([sys.executable, str(ROOT / "docker/broker_settings.py")], env=environment, check=True, timeout=60)
    written = home / "broker"
    assert "ca.key" not in {path.name for path in written.iterdir()}
    # Here it may listen on loopback only.
    settings = written / "mosquitto.conf"
    settings.write_text(settings.read_text().replace(f"listener {port} 0.0.0.0", f"listener {port} 127.0.0.1"))
    broker = subprocess.Popen(
        [find_mosquitto(), "-c", str(settings)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        context = ssl.create_default_context(cafile=str(home / "ca" / "ca.pem"))
        context.load_cert_chain(home / "ca" / f"{CONTROLLER}.pem", home / "ca" / f"{CONTROLLER}.key")
        deadline = time.monotonic() + 15
        while True:
            try:
                with (
                    socket.create_connection(("127.0.0.1", port), timeout=5) as line,
                    context.wrap_socket(line, server_hostname="broker") as secure,
                ):
                    assert secure.version() is not None
                break
            except ConnectionRefusedError:
                assert broker.poll() is None, broker.stderr and broker.stderr.read()
                assert time.monotonic() < deadline
                select.select([], [], [], 0.05)
    finally:
        broker.terminate()
        broker.communicate(timeout=15)
