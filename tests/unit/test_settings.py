"""The controller's settings: file, environment over file, and what is said of a wrong one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from edgefleet_controller import settings
from edgefleet_shared.errors import EdgefleetError, NotFoundError


@pytest.fixture(autouse=True)
def _no_settings_of_whoever_runs_the_tests(monkeypatch):
    for name in [name for name in os.environ if name.startswith("EDGEFLEET_")]:
        monkeypatch.delenv(name)


def home(folder: Path, text: str) -> Path:
    (folder / "controller.yaml").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lissten: 127.0.0.1:1\n", "lissten"),
        ("listen: nowhere\n", "'nowhere' is not host:port"),
        ("listen: 127.0.0.1:70000\n", "'127.0.0.1:70000' is not host:port"),
        ("broker: nowhere\n", "'nowhere' is not host:port"),
        ("public_url: https://0.0.0.0:8443\n", "0.0.0.0 is where to listen, no address"),
        ("public_url: https://[::]:8443\n", ":: is where to listen, no address"),
        ("broker_host: 0.0.0.0\n", "0.0.0.0 is where to listen, no address"),
        ("public_url: http://a\n", "'http://a' is not an https address"),
        ("compile_workers: -1\n", "compile_workers"),
        ("- a\n", "expected settings by name, found list"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(tmp_path, text, told):
    with pytest.raises(EdgefleetError) as caught:
        settings.read(home(tmp_path, text))
    assert told in caught.value.message
    assert "controller.yaml" in caught.value.message


def test_a_home_without_a_fleet_says_how_to_make_one(tmp_path):
    with pytest.raises(NotFoundError, match="fleet init"):
        settings.read(tmp_path)


def test_the_environment_goes_over_the_file_but_never_for_the_operators_token(tmp_path, monkeypatch):
    folder = home(tmp_path, "listen: 127.0.0.1:1\noperator_sha256: own\n")
    monkeypatch.setenv("EDGEFLEET_LISTEN", "127.0.0.1:2")
    monkeypatch.setenv("EDGEFLEET_BROKER_PORT", "1234")
    monkeypatch.setenv("EDGEFLEET_OPERATOR_SHA256", "stranger")
    read = settings.read(folder)
    assert (read.listen_port, read.broker_address, read.operator_sha256) == (2, ("127.0.0.1", 1234), "own")


def test_what_is_written_is_read_again_and_defaults_are_not_written(tmp_path):
    made = settings.Settings(home=tmp_path, broker_port=1234)
    settings.write(made)
    assert (tmp_path / "controller.yaml").read_text() == "broker_port: 1234\n"
    assert (tmp_path / "controller.yaml").stat().st_mode & 0o777 == 0o600
    assert settings.read(tmp_path) == made


def test_the_databases_password_comes_from_its_file_and_survives_odd_characters(tmp_path):
    (tmp_path / "password").write_text("p@ss/word\n")
    text = f"database_url: postgresql://fleet@db/fleet\ndatabase_password_file: {tmp_path}/password\n"
    assert settings.read(home(tmp_path, text)).database == "postgresql://fleet:p%40ss%2Fword@db/fleet"
    (tmp_path / "password").unlink()
    with pytest.raises(EdgefleetError, match="database's password"):
        _ = settings.read(tmp_path).database
