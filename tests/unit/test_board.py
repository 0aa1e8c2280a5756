"""What the board says of itself, read from trees as different boards show them."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgefleet_agent import board, notify, sensors
from edgefleet_shared.fingerprint import architecture


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor : 0\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor: 1\nflags : other\n",
            ("avx2", "avx512_vnni", "fpu"),
        ),
        ("processor : 0\nFeatures\t: fp asimd asimddp\n", ("asimd", "asimddp", "fp")),
        ("nothing known\n", ()),
    ],
)
def test_cpu_features_are_the_kernels_names(tmp_path: Path, text: str, expected: tuple[str, ...]) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert board.cpu_features(tmp_path / "cpuinfo") == expected


@pytest.mark.parametrize(
    ("machine", "bits", "expected"),
    [
        ("aarch64", 64, "aarch64"),
        ("aarch64", 32, "armv7l"),  # Raspberry Pi OS in 32 bits
        ("armv8l", 32, "armv7l"),  # the same under linux32
        ("armv7l", 32, "armv7l"),
        ("x86_64", 32, "i686"),
        ("x86_64", 64, "x86_64"),
    ],
)
def test_a_board_is_what_its_programs_are_whatever_its_kernel(machine: str, bits: int, expected: str) -> None:
    assert architecture(machine, bits) == expected


def test_a_board_that_shows_nothing_gives_nothing_rather_than_a_guess(tmp_path: Path) -> None:
    assert board.cpu_features(tmp_path / "absent") == ()
    assert board.memory_bytes(tmp_path / "absent") == 0
    assert sensors.hottest_celsius(tmp_path) is None
    assert sensors.throttled(tmp_path) is None


def test_the_real_board_has_an_architecture_memory_and_the_engines_that_load() -> None:
    fingerprint = board.read_fingerprint()
    assert fingerprint.arch
    assert fingerprint.memory_bytes > 1 << 28
    assert "onnxruntime" in fingerprint.engines
    assert fingerprint.agent_version


def test_the_hottest_zone_counts_and_a_dead_sensor_does_not(tmp_path: Path) -> None:
    for number, text in enumerate(
        (
            "45000\n",
            "71500\n",
            "0\n",
            "rubbish",
            "",
            "-128000",
            "1000000000",
            "255000",
            "inf",
            "nan",
        )
    ):
        zone = tmp_path / "class" / "thermal" / f"thermal_zone{number}"
        zone.mkdir(parents=True)
        (zone / "temp").write_text(text)
    assert sensors.hottest_celsius(tmp_path) == 71.5


@pytest.mark.parametrize(("current", "expected"), [(1_500_000, False), (600_000, True)])
def test_a_clock_far_below_its_maximum_is_throttled(tmp_path: Path, current: int, expected: bool) -> None:
    policy = tmp_path / "devices" / "system" / "cpu" / "cpufreq" / "policy0"
    policy.mkdir(parents=True)
    (policy / "scaling_cur_freq").write_text(str(current))
    (policy / "cpuinfo_max_freq").write_text("1500000")
    assert sensors.throttled(tmp_path) is expected


@pytest.mark.parametrize(
    ("current", "asked_mhz", "governor", "driver", "expected"),
    [
        (900_000, 900, "schedutil", "cpufreq-dt", False),  # as fast as the class lets it
        (600_000, 900, "schedutil", "cpufreq-dt", True),
        (1_500_000, 2000, "schedutil", "cpufreq-dt", False),  # a ceiling above what the processor can do is none
        (600_000, 0, "powersave", "cpufreq-dt", None),  # it holds the lowest clock, hot or cold
        (600_000, 0, "powersave", "intel_pstate", True),  # here the same word follows the load
    ],
)
def test_a_clock_that_was_asked_for_is_not_throttled(
    tmp_path: Path, current: int, asked_mhz: int, governor: str, driver: str, expected: bool | None
) -> None:
    policy = tmp_path / "devices" / "system" / "cpu" / "cpufreq" / "policy0"
    policy.mkdir(parents=True)
    for name, value in (
        ("scaling_cur_freq", current), ("cpuinfo_max_freq", 1_500_000), ("scaling_governor", governor), ("scaling_driver", driver),
    ):  # fmt: skip
        (policy / name).write_text(f"{value}\n")
    assert sensors.throttled(tmp_path, asked_mhz) is expected


def test_without_a_service_manager_notices_go_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert not notify.ready()
    assert notify.watchdog_period_s() is None
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/socket")
    assert not notify.alive()


def test_a_watchdog_for_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert notify.watchdog_period_s() == 2.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert notify.watchdog_period_s() is None


def test_a_processor_without_a_thermal_zone_is_as_hot_as_its_own_sensor_says(tmp_path: Path) -> None:
    """AMD: the only zone is the firmware's, which says the same all day. Tctl is for the fan, and 27 degrees above the die on some."""
    for name, text in (
        ("thermal/thermal_zone0/temp", "16800"),
        ("hwmon/hwmon0/name", "nvme"),
        ("hwmon/hwmon0/temp1_input", "91000"),
        ("hwmon/hwmon1/name", "k10temp"),
        ("hwmon/hwmon1/temp1_input", "98250"),
        ("hwmon/hwmon1/temp1_label", "Tctl"),
        ("hwmon/hwmon1/temp2_input", "71250"),
        ("hwmon/hwmon1/temp2_label", "Tdie"),
    ):
        path = tmp_path / "class" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert sensors.hottest_celsius(tmp_path) == 71.25
    (tmp_path / "class/hwmon/hwmon1/temp2_label").write_text("Tccd1")
    assert sensors.hottest_celsius(tmp_path) == 98.25
    (tmp_path / "class/hwmon/hwmon1/name").unlink()
    assert sensors.hottest_celsius(tmp_path) == 16.8
