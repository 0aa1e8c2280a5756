"""Power profiles on a cpufreq tree as kernels show it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from edgefleet_agent import power_profile
from edgefleet_shared.artifact import PowerProfile
from edgefleet_shared.errors import EnvironmentProblem


class Cpus:
    """Two clusters, as on a big.LITTLE board."""

    def __init__(self, root: Path) -> None:
        self.root, self.kept = root / "sys", root / "run" / "before.json"
        for policy, least, most in (("policy0", 408_000, 1_800_000), ("policy4", 408_000, 2_256_000)):
            folder = self.root / "devices/system/cpu/cpufreq" / policy
            folder.mkdir(parents=True)
            for name, value in (
                ("scaling_governor", "schedutil"), ("scaling_max_freq", most), ("cpuinfo_min_freq", least),
                ("cpuinfo_max_freq", most), ("scaling_available_governors", "performance powersave schedutil"),
            ):  # fmt: skip
                (folder / name).write_text(f"{value}\n")
        for cpu in ("cpu0", "cpu4"):
            self.wake(cpu).parent.mkdir(parents=True)
            self.wake(cpu).write_text("0\n")

    def wake(self, cpu: str) -> Path:
        return self.root / "devices/system/cpu" / cpu / "power/pm_qos_resume_latency_us"

    def wakes(self) -> list[str]:
        return [self.wake(cpu).read_text().strip() for cpu in ("cpu0", "cpu4")]

    def apply(self, **profile: object) -> list[str]:
        return power_profile.apply(PowerProfile(**profile), self.root, self.kept)  # type: ignore[arg-type]

    def now(self) -> dict[str, tuple[str, str]]:
        return {
            p.name: ((p / "scaling_governor").read_text().strip(), (p / "scaling_max_freq").read_text().strip())
            for p in (self.root / "devices/system/cpu/cpufreq").iterdir()
        }


@pytest.fixture
def cpus(tmp_path: Path) -> Cpus:
    return Cpus(tmp_path)


AS_IT_WAS = {"policy0": ("schedutil", "1800000"), "policy4": ("schedutil", "2256000")}


def test_a_profile_is_applied_to_every_cluster_and_undone(cpus: Cpus) -> None:
    assert len(cpus.apply(governor="powersave", max_clock_mhz=1200)) == 4
    assert cpus.now() == {"policy0": ("powersave", "1200000"), "policy4": ("powersave", "1200000")}
    assert cpus.apply(governor="powersave", max_clock_mhz=1200) == []
    cpus.apply()
    assert cpus.now() == AS_IT_WAS


@pytest.mark.parametrize("cooling", ["thermal-cpufreq-0", "cpufreq-cpu0", "Processor"])
def test_a_board_that_is_being_cooled_is_not_kept_slow_when_it_is_cool(cpus: Cpus, cooling: str) -> None:
    """The kernel lowers scaling_max_freq itself then, and raises it again: that was nobody's setting."""
    device = cpus.root / "class/thermal/cooling_device2"
    device.mkdir(parents=True)
    (device / "type").write_text(f"{cooling}\n")
    (device / "cur_state").write_text("3\n")
    ceiling = cpus.root / "devices/system/cpu/cpufreq/policy4/scaling_max_freq"
    ceiling.write_text("1200000\n")
    cpus.apply()
    (device / "cur_state").write_text("0\n")
    ceiling.write_text("2256000\n")
    assert cpus.apply() == []
    assert cpus.now() == AS_IT_WAS


def test_a_ceiling_that_was_set_on_a_cool_board_is_put_back(cpus: Cpus) -> None:
    ceiling = cpus.root / "devices/system/cpu/cpufreq/policy4/scaling_max_freq"
    ceiling.write_text("1200000\n")
    fan = cpus.root / "class/thermal/cooling_device0"
    fan.mkdir(parents=True)
    (fan / "type").write_text("pwm-fan\n")
    (fan / "cur_state").write_text("2\n")
    cpus.apply(max_clock_mhz=600)
    cpus.apply()
    assert ceiling.read_text().strip() == "1200000"


def test_a_floor_above_the_ceiling_comes_down_first_and_goes_up_last(cpus: Cpus) -> None:
    """As jetson_clocks leaves a board. Kernels before 5.3 refuse a highest clock below the lowest one."""
    floor = cpus.root / "devices/system/cpu/cpufreq/policy0/scaling_min_freq"
    floor.write_text("1800000\n")
    ceiling_and_floor = ["policy0: scaling_min_freq 1200000", "policy0: scaling_max_freq 1200000"]
    assert [line for line in cpus.apply(max_clock_mhz=1200) if "policy0" in line] == ceiling_and_floor
    cpus.apply(max_clock_mhz=1500)
    assert floor.read_text().strip() == "1500000"
    undone = [line for line in cpus.apply() if "policy0" in line]
    assert undone == ["policy0: scaling_max_freq 1800000", "policy0: scaling_min_freq 1800000"]


def test_one_profile_after_another_goes_back_to_what_was_before_the_first(cpus: Cpus) -> None:
    cpus.apply(governor="powersave", max_clock_mhz=1200)
    cpus.apply(max_clock_mhz=1500)
    assert cpus.now() == {"policy0": ("schedutil", "1500000"), "policy4": ("schedutil", "1500000")}
    cpus.apply()
    assert cpus.now() == AS_IT_WAS


def test_a_ceiling_above_a_cluster_is_that_clusters_own(cpus: Cpus) -> None:
    cpus.apply(max_clock_mhz=2000)
    assert cpus.now() == {"policy0": ("schedutil", "1800000"), "policy4": ("schedutil", "2000000")}


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ({"governor": "turbo"}, "no governor 'turbo'"),
        ({"governor": "powersave\n0"}, "no governor"),
        ({"max_clock_mhz": 100}, "runs at 408 MHz or more"),
    ],
)
def test_what_the_kernel_does_not_offer_changes_nothing(cpus: Cpus, profile: dict, words: str) -> None:
    with pytest.raises(EnvironmentProblem, match=words):
        cpus.apply(**profile)
    assert cpus.now() == AS_IT_WAS


@pytest.fixture
def refusing(cpus: Cpus) -> Iterator[Cpus]:
    """The second cluster's governor reads as it is and can't be written, by root neither."""
    governor = cpus.root / "devices/system/cpu/cpufreq/policy4/scaling_governor"
    fd = os.memfd_create("governor", os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, governor.read_bytes())
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
        governor.unlink()
        governor.symlink_to(f"/proc/{os.getpid()}/fd/{fd}")
        yield cpus
    finally:
        os.close(fd)


def test_a_profile_that_the_kernel_refuses_half_way_is_undone_at_once(refusing: Cpus) -> None:
    with pytest.raises(EnvironmentProblem, match=r"policy4/scaling_governor to powersave"):
        refusing.apply(governor="powersave", max_clock_mhz=1200, max_wake_us=50)
    assert refusing.now() == AS_IT_WAS
    assert refusing.wakes() == ["0", "0"]


def test_one_that_is_refused_half_way_takes_the_one_before_it_with_it(refusing: Cpus) -> None:
    """Whose model does not serve any more."""
    refusing.apply(max_clock_mhz=1500, max_wake_us=50)
    with pytest.raises(EnvironmentProblem, match=r"policy4/scaling_governor to powersave"):
        refusing.apply(governor="powersave", max_clock_mhz=1200)
    assert refusing.now() == AS_IT_WAS
    assert refusing.wakes() == ["0", "0"]


def test_a_limit_of_one_cluster_alone_changes_none(cpus: Cpus) -> None:
    (cpus.root / "devices/system/cpu/cpufreq/policy4/scaling_available_governors").write_text("performance\n")
    with pytest.raises(EnvironmentProblem, match="policy4"):
        cpus.apply(governor="powersave")
    assert cpus.now() == AS_IT_WAS


def test_a_cluster_that_is_switched_off_keeps_no_other_from_its_profile(cpus: Cpus) -> None:
    off = cpus.root / "devices/system/cpu/cpufreq/policy4"
    for name in ("scaling_governor", "scaling_max_freq", "cpuinfo_max_freq", "scaling_available_governors"):
        (off / name).unlink()
        (off / name).mkdir()  # as EBUSY does, it answers neither a read nor a write
    cpus.apply(governor="powersave", max_clock_mhz=1200)
    policy = cpus.root / "devices/system/cpu/cpufreq/policy0"
    assert (policy / "scaling_governor").read_text() == "powersave"
    for name, value in (
        ("scaling_governor", "schedutil"), ("scaling_max_freq", 2_256_000), ("cpuinfo_max_freq", 2_256_000),
        ("scaling_available_governors", "performance powersave schedutil"),
    ):  # fmt: skip
        (off / name).rmdir()
        (off / name).write_text(f"{value}\n")
    cpus.apply(governor="powersave", max_clock_mhz=1200)  # it is on again
    cpus.apply()
    assert cpus.now() == AS_IT_WAS


def test_processors_wake_up_in_time_while_a_profile_asks_for_it(cpus: Cpus) -> None:
    cpus.apply(governor="powersave")
    assert cpus.wakes() == ["0", "0"]
    assert cpus.apply(max_wake_us=50) == [
        "policy0: scaling_governor schedutil", "policy4: scaling_governor schedutil",
        "cpu0: pm_qos_resume_latency_us 50", "cpu4: pm_qos_resume_latency_us 50",
    ]  # fmt: skip
    cpus.apply(max_wake_us=0)
    assert cpus.wakes() == ["n/a", "n/a"]
    assert cpus.apply(max_wake_us=0) == []
    cpus.apply()
    assert cpus.wakes() == ["0", "0"]
    assert cpus.now() == AS_IT_WAS


@pytest.mark.parametrize(("before", "asked", "then"), [("20", 50, "20"), ("100", 50, "50"), ("n/a", 50, "n/a")])
def test_a_stricter_limit_of_somebody_else_stays(cpus: Cpus, before: str, asked: int, then: str) -> None:
    cpus.wake("cpu4").write_text(f"{before}\n")
    cpus.apply(max_wake_us=asked)
    assert cpus.wakes() == [str(asked), then]
    cpus.apply()
    assert cpus.wakes() == ["0", before]


def test_a_kernel_without_such_limits_gets_no_half_profile(cpus: Cpus) -> None:
    for cpu in ("cpu0", "cpu4"):
        cpus.wake(cpu).unlink()
    with pytest.raises(EnvironmentProblem, match="takes no limit"):
        cpus.apply(governor="powersave", max_wake_us=50)
    assert cpus.now() == AS_IT_WAS


def test_limits_for_waking_up_need_no_clocks_that_scale(cpus: Cpus) -> None:
    shutil.rmtree(cpus.root / "devices/system/cpu/cpufreq")
    assert len(cpus.apply(max_wake_us=50)) == 2
    assert len(cpus.apply()) == 2


def test_this_machines_own_kernel_takes_and_gives_back_a_limit(tmp_path: Path) -> None:
    files = sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/power/pm_qos_resume_latency_us"))
    before = [file.read_text() for file in files]
    if not files or not os.access(files[0], os.W_OK):
        pytest.skip("this kernel has no such files, or this user may not write them")
    profile = PowerProfile(max_wake_us=1_000_000)
    try:
        power_profile.apply(profile, kept=tmp_path / "before.json")
        assert {file.read_text().strip() for file in files} == {"1000000"}
    finally:
        power_profile.apply(PowerProfile(), kept=tmp_path / "before.json")
    assert [file.read_text() for file in files] == before


def test_a_board_that_does_not_scale_says_so_only_when_it_is_asked_to(tmp_path: Path) -> None:
    assert power_profile.apply(PowerProfile(), tmp_path, tmp_path / "kept") == []
    with pytest.raises(EnvironmentProblem, match="does not scale"):
        power_profile.apply(PowerProfile(governor="powersave"), tmp_path, tmp_path / "kept")


def test_what_was_there_before_is_found_again_after_the_note_was_damaged(cpus: Cpus) -> None:
    cpus.kept.parent.mkdir(parents=True)
    cpus.kept.write_bytes(b"{torn")
    cpus.apply(governor="powersave")
    cpus.apply()
    assert cpus.now() == AS_IT_WAS
