"""The units as systemd itself reads them, without systemd running."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted(ROOT.glob("*/edgefleet_*/systemd/*.service"))
# What `systemd-analyze security` may say at most; Debian's own units of this kind stand at 9.6.
EXPOSURE = {
    "fleet-agent.service": 1.5, "fleet-runtime.service": 0.6, "fleet-power.service": 1.5, "fleet-controller.service": 1.5,
    "fleet-worker.service": 1.5,
    "fleet-runtime-grpc.service": 0.6,
}  # fmt: skip

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def analyze(*arguments: str | Path) -> tuple[str, str]:
    """systemd-analyze's stdout and stderr; a warning is no error to it, so its status says little."""
    done = subprocess.run(["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    return done.stdout, done.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Every unit in one folder, its program replaced by one that exists here."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for source in ROOT.glob("*/edgefleet_*/systemd/*.*"):
        text = source.read_text()
        (tmp_path / source.name).write_text(
            re.sub(r"^ExecStart=/usr/bin/\S+", f"ExecStart={program}", text, flags=re.M)
        )
    return tmp_path


def test_the_services_are_there():
    assert {unit.name for unit in UNITS} == set(EXPOSURE)


@pytest.mark.parametrize(
    "name", [*EXPOSURE, "fleet-runtime.socket", "fleet-runtime-grpc.socket", "fleet-power.path", "fleet-power.timer"]
)
def test_systemd_reads_the_unit_without_a_word(installed, name):
    _, complaints = analyze("verify", "--man=no", installed / name)
    assert complaints == ""


GUIDES = "".join(guide.read_text() for guide in sorted((ROOT / "docs/guides").glob("*.md")))
DROP_INS = [block for block in re.findall(r"^```\n(.*?)^```", GUIDES, flags=re.M | re.S) if "\n[Service]\n" in block]


def test_the_guides_hold_a_drop_in():
    assert DROP_INS


@pytest.mark.parametrize("block", DROP_INS)
def test_systemd_reads_a_guides_drop_in_without_a_word(installed, block):
    places = re.findall(r"(fleet-[a-z-]+\.service)\.d/([a-z-]+\.conf)", block)
    assert places
    for unit, name in places:
        (installed / f"{unit}.d").mkdir()
        (installed / f"{unit}.d" / name).write_text(block)
        _, complaints = analyze("verify", "--man=no", installed / unit)
        assert complaints == ""


def test_a_misspelt_key_would_be_noticed(installed):
    unit = installed / "fleet-agent.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchDogSec="))
    assert "WatchDogSec" in analyze("verify", "--man=no", unit)[1]


@pytest.mark.parametrize(("name", "limit"), EXPOSURE.items())
def test_exposure_stays_low(installed, name, limit):
    out, _ = analyze("security", "--offline=true", "--no-pager", installed / name)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", out)
    assert found is not None, out
    assert float(found.group(1)) <= limit, out


@pytest.mark.parametrize("name", ["fleet-agent.service", "fleet-runtime.service"])
def test_a_board_service_notifies_is_watched_and_comes_back(name):
    text = (ROOT / "agent/edgefleet_agent/systemd" / name).read_text()
    for line in ("Type=notify", "Restart=always", "StartLimitIntervalSec=0", "User=edgefleet"):
        assert line in text.splitlines()
    assert re.search(r"^WatchdogSec=\d+$", text, flags=re.M)


def test_the_runtime_alone_is_told_to_stop_so_that_its_workers_answer_what_they_have():
    text = next(unit for unit in UNITS if unit.name == "fleet-runtime.service").read_text()
    assert re.search("^KillMode=mixed$", text, flags=re.M)


@pytest.mark.parametrize(
    "name", ["fleet-controller.service", "fleet-worker.service", "fleet-agent.service", "fleet-runtime.service"]
)
def test_a_child_that_the_kernel_ends_for_want_of_memory_does_not_end_the_service(name):
    """systemd's own choice is to stop the whole unit."""
    text = next(unit for unit in UNITS if unit.name == name).read_text()
    assert re.search("^OOMPolicy=continue$", text, flags=re.M)


def test_what_serves_is_not_the_first_to_be_ended_when_memory_ends():
    score = {unit.name: re.search(r"^OOMScoreAdjust=(-?\d+)$", unit.read_text(), flags=re.M) for unit in UNITS}
    runtime, agent = score["fleet-runtime.service"], score["fleet-agent.service"]
    assert runtime is not None
    assert agent is not None
    assert int(runtime.group(1)) < int(agent.group(1)) < 0


@pytest.mark.parametrize("name", ["fleet-power.service", "fleet-runtime-grpc.service"])
def test_what_is_started_by_something_else_is_never_started_too_often(name):
    """A start limit that is hit fails the path, or the socket, as well: nothing would start it again."""
    text = (ROOT / "agent/edgefleet_agent/systemd" / name).read_text()
    assert "StartLimitIntervalSec=0" in text.splitlines()


@pytest.mark.parametrize(
    ("name", "other"), [("fleet-agent.service", "fleet-runtime"), ("fleet-runtime.service", "fleet-agent")]
)
def test_neither_service_of_a_board_stops_the_other(name, other):
    text = (ROOT / "agent/edgefleet_agent/systemd" / name).read_text()
    tying = re.compile(rf"^(Requires|Requisite|BindsTo|PartOf|Conflicts|Upholds)=.*{other}\.", flags=re.M)
    assert not tying.search(text)


@pytest.mark.parametrize("name", ["fleet-runtime.socket", "fleet-runtime-grpc.socket"])
def test_the_runtime_is_reached_from_the_board_only(name):
    lines = (ROOT / "agent/edgefleet_agent/systemd" / name).read_text().splitlines()
    addresses = [line.partition("=")[2] for line in lines if line.startswith("ListenStream=")]
    assert addresses
    assert all(address.startswith(("127.0.0.1:", "%t/")) for address in addresses)
