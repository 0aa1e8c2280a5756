"""The launcher: which version of the agent it starts, from whatever it finds on the disk."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from edgefleet_agent import launcher, slots
from edgefleet_agent.launcher import LATE_STARTS, ORDER, STARTS, Choice, Trial
from edgefleet_agent.slots import Slot, Slots, SlotStatus
from edgefleet_shared import artifact
from edgefleet_shared.artifact import SCHEMA, AgentConfig, Layout
from edgefleet_shared.fingerprint import Requirement

PACKAGE = "1"


class Disk:
    """A state folder with two versions of the agent."""

    def __init__(self, state: Path) -> None:
        self.state, self.own = state, launcher.folder(state)
        self.layout = Layout(self.own / "artifacts")
        self.new, self.old = (self.make(v) for v in ("2", "1"))
        self.install(SlotStatus.GOOD)
        self.trial()

    def make(self, version: str) -> str:
        config = AgentConfig(schema=SCHEMA, version=version, device_class="c", requires=Requirement())
        return artifact.build_agent(self.layout, config, f"code {version}".encode()).digest

    def install(self, status: SlotStatus) -> None:
        slots.write(
            self.own,
            Slots(
                active=Slot(self.new, "edgefleet-agent", "2", status),
                previous=Slot(self.old, "edgefleet-agent", "1", SlotStatus.GOOD),
            ),
        )

    def trial(self, **changes: object) -> None:
        launcher.write_trial(self.state, Trial(self.new, 20.0, PACKAGE)._replace(**changes))

    def code(self, manifest: str) -> Path:
        return self.layout.path(self.layout.manifest(manifest).layers[0].digest)

    def choose(self) -> Choice:
        return launcher.choose(self.state, PACKAGE)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def test_every_status_and_state_of_a_trial_has_a_row() -> None:
    statuses = ("none", *(status.value for status in SlotStatus))
    assert set(ORDER) == set(itertools.product(statuses, (True, False)))


def test_a_board_that_never_took_a_version_starts_the_packages(tmp_path: Path) -> None:
    assert launcher.choose(tmp_path, PACKAGE) == Choice()


def test_a_committed_version_is_started_without_alarm_until_it_has_ended_too_often_in_a_row(disk: Disk) -> None:
    chosen = [disk.choose() for _ in range(LATE_STARTS + 2)]
    assert chosen[0] == Choice(disk.new, str(disk.code(disk.new)), 0.0)
    assert [c.manifest for c in chosen] == [disk.new] * LATE_STARTS + [disk.old] * 2
    assert {c.alarm_s for c in chosen} == {0.0}


def test_a_committed_version_that_settles_in_between_is_never_given_up(disk: Disk) -> None:
    for _ in range(3):
        assert {disk.choose().manifest for _ in range(LATE_STARTS - 1)} == {disk.new}
        launcher.settle(disk.state, disk.new)


def test_a_version_on_trial_does_not_settle(disk: Disk) -> None:
    disk.install(SlotStatus.UNKNOWN)
    for _ in range(STARTS):
        assert disk.choose().manifest == disk.new
        launcher.settle(disk.state, disk.new)
    assert disk.choose().manifest == disk.old


def test_a_version_that_is_active_again_after_another_ones_trial_is_counted_by_itself(disk: Disk) -> None:
    disk.trial(manifest=disk.old, starts=STARTS)
    assert disk.choose().manifest == disk.new
    assert launcher.read_trial(disk.state) == Trial(disk.new, 20.0, PACKAGE, 1)


def test_to_ask_what_would_be_started_counts_nothing(disk: Disk) -> None:
    assert launcher.choose(disk.state, PACKAGE, counting=False).manifest == disk.new
    assert launcher.read_trial(disk.state) == Trial(disk.new, 20.0, PACKAGE, 0)


def test_a_version_on_trial_is_given_so_many_starts_each_with_an_alarm(disk: Disk) -> None:
    disk.install(SlotStatus.UNKNOWN)
    chosen = [disk.choose() for _ in range(STARTS + 2)]
    assert [c.manifest for c in chosen] == [disk.new] * STARTS + [disk.old] * 2
    assert [c.alarm_s for c in chosen] == [30.0] * STARTS + [0.0] * 2


def test_a_start_that_can_not_be_counted_is_not_made(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.install(SlotStatus.UNKNOWN)

    def full(*arguments: object, **options: object) -> None:
        raise launcher.EdgefleetError("no space left on the device")

    monkeypatch.setattr(launcher.atomic, "write", full)
    assert disk.choose().manifest == disk.old
    monkeypatch.undo()
    disk.install(SlotStatus.GOOD)
    monkeypatch.setattr(launcher.atomic, "write", full)
    assert disk.choose().manifest == disk.new, "one that was committed is started all the same"


@pytest.mark.parametrize("status", list(SlotStatus))
def test_changed_bytes_are_never_started(disk: Disk, status: SlotStatus) -> None:
    disk.install(status)
    disk.code(disk.new).write_bytes(b"hostile")
    assert disk.choose().manifest == disk.old
    disk.code(disk.old).write_bytes(b"hostile")
    assert disk.choose() == Choice()


def test_a_manifest_that_names_another_zip_is_never_started(disk: Disk) -> None:
    path = disk.layout.path(disk.new)
    path.write_bytes(path.read_bytes().replace(b'"layers"', b'"Layers"'))
    assert disk.choose().manifest == disk.old


@pytest.mark.parametrize("package", ["0", "2", ""])
def test_what_was_taken_on_another_package_is_not_started_on_this_one(disk: Disk, package: str) -> None:
    assert launcher.choose(disk.state, package) == Choice()


@pytest.mark.parametrize("name", ["slots.json", "trial.json"])
@pytest.mark.parametrize(
    "content", [b"", b"\0" * 40, b"[]", b"{", b'{"active": 3, "previous": []}', b"[" * 100_000, b'{"manifest": null}']
)
def test_whatever_lies_there_the_packages_version_is_left(disk: Disk, name: str, content: bytes) -> None:
    (disk.own / name).write_bytes(content)
    assert disk.choose() == Choice()


@pytest.mark.parametrize("status", [SlotStatus.UNKNOWN, SlotStatus.GOOD])
@pytest.mark.parametrize(
    "figures",
    [{"limit_s": limit_s} for limit_s in (math.inf, math.nan, -1.0, 0.0, 1e30)]
    + [{"starts": starts} for starts in (math.inf, -1_000_000)],
    ids=str,
)
def test_a_trial_whose_figures_are_none_is_no_trial(disk: Disk, status: SlotStatus, figures: dict[str, float]) -> None:
    disk.install(status)
    disk.trial(**figures)
    assert disk.choose() == Choice()


@pytest.mark.parametrize("digest", ["", "sha256:../../../../etc/passwd", "sha256:" + "A" * 64, "md5:" + "a" * 64, "x"])
def test_attack_a_digest_that_is_a_path_leads_nowhere(disk: Disk, digest: str) -> None:
    content = json.loads((disk.own / "slots.json").read_bytes())
    content["active"]["manifest"] = digest
    (disk.own / "slots.json").write_text(json.dumps(content))
    assert disk.choose().manifest == disk.old


def test_it_goes_by_the_same_name_of_the_layer_as_those_who_write_it() -> None:
    assert launcher.CODE_LAYER == artifact.CODE_LAYER


def test_it_needs_nothing_but_the_standard_library_and_our_own_way_to_write() -> None:
    told = "import sys, edgefleet_agent.launcher as l; print(*{m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path += {[p for p in sys.path if p]!r}; {told}"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert set(done.stdout.split()) == {"__main__", "edgefleet_agent", "edgefleet_shared"}


def test_a_version_larger_than_the_boards_memory_costs_no_memory_to_look_at(disk: Disk) -> None:
    size = 64 << 20
    config = AgentConfig(schema=SCHEMA, version="3", device_class="c", requires=Requirement())
    large = artifact.build_agent(disk.layout, config, bytes(size)).digest
    slots.write(disk.own, Slots(active=Slot(large, "edgefleet-agent", "3", SlotStatus.UNKNOWN)))
    disk.trial(manifest=large)
    tracemalloc.start()
    try:
        chosen = disk.choose()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert chosen.manifest == large
    assert peak < size / 16
