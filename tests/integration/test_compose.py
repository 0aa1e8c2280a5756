"""docker-compose.yml as docker-compose itself reads it; no engine is needed for that."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

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
