"""The power meter on sysfs trees as boards show them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from edgefleet_agent.health import EnergyMeter
from edgefleet_agent.power import FIND_AGAIN_S, PowerMeter, watts


class Board:
    """A sysfs tree and a clock."""

    def __init__(self, root: Path) -> None:
        self.root, self.now = root, 0.0

    def write(self, **files: object) -> None:
        for name, content in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    def put(self, folder: str, **files: object) -> None:
        self.write(**{f"class/{folder}/{name}": content for name, content in files.items()})

    def meter(self) -> PowerMeter:
        return PowerMeter(self.root, lambda: self.now)


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def mean(board: Board, meter: PowerMeter, seconds: float) -> float | None:
    before = meter.look()
    board.now += seconds
    return watts(before, meter.look())


def test_a_board_that_shows_nothing_has_no_power(board: Board) -> None:
    meter = board.meter()
    assert (meter.source, meter.scope, meter.look()) == ("", None, None)


def test_a_jetson_is_measured_at_its_input_not_at_the_sum_of_input_and_parts(board: Board) -> None:
    board.put(
        "hwmon/hwmon3", name="ina3221", in1_label="VDD_IN", in1_input=5000, curr1_input=1400,
        in2_label="VDD_CPU_GPU_CV", in2_input=5000, curr2_input=600, in3_label="VDD_SOC", in3_input=5000, curr3_input=300,
    )  # fmt: skip
    meter = board.meter()
    assert meter.scope == "board"
    assert "VDD_IN" in meter.source
    assert mean(board, meter, 2.0) == pytest.approx(7.0)


def test_channels_without_an_input_among_them_are_summed(board: Board) -> None:
    board.put("hwmon/hwmon0", name="ina226", power1_input=1_500_000, power2_input=500_000)
    assert mean(board, board.meter(), 1.0) == pytest.approx(2.0)


def ina3221(board: Board, number: int, **rails: tuple[int, int]) -> None:
    """A chip of three channels as Linux shows it: those that are connected with their mV and mA, then the shunts (in uV) and what the driver adds up."""
    files: dict[str, object] = {"name": "ina3221", "curr4_input": sum(ampere for _, ampere in rails.values())}
    for channel, (label, (volt, ampere)) in enumerate(rails.items(), 1):
        files |= {f"in{channel}_label": label, f"in{channel}_input": volt, f"curr{channel}_input": ampere}
        files |= {f"in{channel + 3}_input": 2 * ampere}
    board.put(f"hwmon/hwmon{number}", **files)


def test_a_jetson_whose_rails_are_on_two_chips_is_their_sum(board: Board) -> None:
    """AGX Orin: nothing measures its input, and 5 V are one rail of several. A channel that is not connected has files, and answers ENODATA."""
    ina3221(board, 3, VDD_GPU_SOC=(11_904, 500), VDD_CPU_CV=(11_904, 300), VIN_SYS_5V0=(4_968, 953))
    ina3221(board, 4, NC=(0, 0), VDDQ_VDD2_1V8AO=(4_968, 220))
    board.put("hwmon/hwmon4", in1_input="", curr1_input="")
    meter = board.meter()
    assert mean(board, meter, 1.0) == pytest.approx(5.952 + 3.571 + 4.734 + 1.093, rel=1e-3)
    assert meter.source == "ina3221 4 channels"


def test_the_input_is_found_on_whichever_chip_it_is(board: Board) -> None:
    """TX2: the parts are on the chip that is found first."""
    ina3221(board, 1, VDD_SYS_GPU=(19_000, 100), VDD_SYS_SOC=(19_000, 60), VDD_4V0_WIFI=(4_800, 30))
    ina3221(board, 2, VDD_IN=(19_100, 400), VDD_SYS_CPU=(19_000, 80), VDD_SYS_DDR=(4_800, 200))
    assert mean(board, board.meter(), 1.0) == pytest.approx(7.64)


def test_two_kinds_of_monitors_may_measure_the_same_and_are_not_added_up(board: Board) -> None:
    board.put("hwmon/hwmon0", name="ina226", power1_input=9_000_000)
    ina3221(board, 1, VDD_CPU=(5_000, 400))
    assert mean(board, board.meter(), 1.0) == pytest.approx(9.0)


def test_what_no_board_draws_is_not_counted(board: Board) -> None:
    board.put("hwmon/hwmon0", name="ina226", power1_input=4_000_000)
    meter = board.meter()
    board.put("hwmon/hwmon0", power1_input=4_294_967_296_000_000)
    assert mean(board, meter, 1.0) is None
    board.put("hwmon/hwmon0", power1_input=4_000_000)
    meter.look()
    assert mean(board, meter, 1.0) == pytest.approx(4.0)


def test_a_temperature_chip_is_no_power_monitor(board: Board) -> None:
    board.put("hwmon/hwmon0", name="nvme", temp1_input=40_000, power1_input=9_000_000)
    assert board.meter().look() is None


def test_a_changing_load_is_integrated_between_looks(board: Board) -> None:
    board.put("hwmon/hwmon0", name="ina226", power1_input=1_000_000)
    meter = board.meter()
    before = meter.look()
    board.now = 1.0
    board.put("hwmon/hwmon0", power1_input=3_000_000)
    meter.look()
    board.now = 2.0
    after = meter.look()
    assert after is not None
    assert before is not None
    assert after.joules - before.joules == pytest.approx(2.0 + 3.0)


def test_a_battery_tells_only_while_it_is_discharged(board: Board) -> None:
    board.put("power_supply/BAT0", type="Battery", status="Charging", power_now=9_000_000)
    assert board.meter().look() is None
    board.put("power_supply/BAT0", status="Discharging", power_now=4_000_000)
    meter = board.meter()
    assert mean(board, meter, 3.0) == pytest.approx(4.0)
    board.put("power_supply/BAT0", status="Charging")
    assert meter.look() is None


def test_two_batteries_feed_the_board_together_and_one_that_is_empty_leaves_it_to_the_other(board: Board) -> None:
    board.put("power_supply/BAT0", type="Battery", status="Discharging", power_now=4_000_000)
    board.put("power_supply/BAT1", type="Battery", status="Discharging", voltage_now=12_000_000, current_now=-250_000)
    meter = board.meter()
    assert mean(board, meter, 1.0) == pytest.approx(7.0)
    board.put("power_supply/BAT0", status="Not charging", power_now=0)
    board.put("power_supply/BAT1", current_now=-600_000)
    meter.look()
    assert mean(board, meter, 1.0) == pytest.approx(7.2)
    board.put("power_supply/BAT0", status="Charging", power_now=9_000_000)
    assert meter.look() is None


def test_the_battery_of_a_mouse_does_not_feed_the_board(board: Board) -> None:
    board.put("power_supply/hid-1", type="Battery", scope="Device", status="Discharging", power_now=10_000)
    assert board.meter().look() is None


def test_a_battery_by_voltage_and_a_current_that_is_negative_while_it_flows_out(board: Board) -> None:
    board.put("power_supply/bat", type="Battery", status="Discharging", voltage_now=12_000_000, current_now=-250_000)
    assert mean(board, board.meter(), 1.0) == pytest.approx(3.0)


def test_rapl_counts_packages_not_their_parts_and_is_no_board(board: Board) -> None:
    for zone, name, energy in (("0", "package-0", 1000), ("0:0", "core", 5), ("1", "package-1", 2000)):
        board.put(f"powercap/intel-rapl:{zone}", name=name, energy_uj=energy, max_energy_range_uj=10_000_000)
    meter = board.meter()
    assert meter.scope == "package"
    before = meter.look()
    board.put("powercap/intel-rapl:0", energy_uj=2_001_000)
    board.put("powercap/intel-rapl:1", energy_uj=1_002_000)
    board.now = 2.0
    assert watts(before, meter.look()) == pytest.approx(1.5)


def test_a_counter_that_starts_again_loses_nothing(board: Board) -> None:
    board.put("powercap/intel-rapl:0", name="psys", energy_uj=9_000_000, max_energy_range_uj=10_000_000)
    meter = board.meter()
    assert meter.scope == "board"
    before = meter.look()
    board.put("powercap/intel-rapl:0", energy_uj=1_000_000)
    board.now = 1.0
    assert watts(before, meter.look()) == pytest.approx(2.0)


@pytest.mark.parametrize("limit", [262_143_328_850, "", -1])
def test_a_counter_that_was_reset_is_no_burst_of_energy(board: Board, limit: object) -> None:
    """A board that slept, or a driver that was loaded anew: the counter begins at nothing, far from its limit."""
    rapl = "powercap/intel-rapl:0"
    board.put(rapl, name="psys", energy_uj=5_000_000_000, max_energy_range_uj=limit)
    meter = board.meter()
    board.put(rapl, energy_uj=0)
    board.now = 60.0
    assert meter.look() is None, "how much it was is not known"
    board.put(rapl, energy_uj=120_000_000)
    board.now = 120.0
    after = meter.look()
    assert after is not None
    assert (after.joules, after.at_s) == (120.0, 120.0)


@pytest.mark.parametrize("content", ["", "rubbish", "\x00", "nan", "inf"])
def test_a_sensor_that_reads_rubbish_measures_nothing(board: Board, content: str) -> None:
    board.put("hwmon/hwmon0", name="ina226", power1_input=content)
    assert board.meter().look() is None


def test_a_sensor_that_goes_away_is_no_zero(board: Board) -> None:
    board.put("hwmon/hwmon0", name="ina226", power1_input=1_000_000)
    meter = board.meter()
    before = meter.look()
    (board.root / "class/hwmon/hwmon0/power1_input").unlink()
    board.now = 1.0
    assert watts(before, meter.look()) is None


def test_a_sensor_whose_driver_loads_after_the_meter_was_made_is_found(board: Board) -> None:
    meter = board.meter()
    assert meter.look() is None
    board.put("hwmon/hwmon0", name="ina226", power1_input=3_000_000)
    board.now += FIND_AGAIN_S
    meter.look()
    assert mean(board, meter, 1.0) == pytest.approx(3.0)
    assert meter.scope == "board"


def test_a_sensor_that_came_back_under_another_number_is_found(board: Board) -> None:
    board.put("hwmon/hwmon0", name="ina226", power1_input=3_000_000)
    meter = board.meter()
    shutil.rmtree(board.root / "class/hwmon/hwmon0")
    board.put("hwmon/hwmon1", name="ina226", power1_input=2_000_000)
    assert meter.look() is None
    board.now += FIND_AGAIN_S
    meter.look()
    assert mean(board, meter, 1.0) == pytest.approx(2.0)


def test_a_number_that_another_chip_has_by_now_is_not_read_in_place_of_the_first(board: Board) -> None:
    """The kernel's class is links into its tree of devices; drivers that are loaded anew in another order get each other's number."""

    def load(**numbers: int) -> None:
        shutil.rmtree(board.root / "class", ignore_errors=True)
        shutil.rmtree(board.root / "devices", ignore_errors=True)
        (board.root / "class/hwmon").mkdir(parents=True)
        for device, (kind, watts_now) in {"supply": ("ina226", 9), "rail": ("ina219", 1)}.items():
            chip = f"devices/{device}/hwmon/hwmon{numbers[device]}"
            board.write(**{f"{chip}/name": kind, f"{chip}/power1_input": watts_now * 1_000_000})
            if device == "supply":
                board.write(**{f"{chip}/power1_label": "VDD_IN"})
            (board.root / f"class/hwmon/hwmon{numbers[device]}").symlink_to(board.root / chip)

    load(supply=0, rail=1)
    meter = board.meter()
    assert mean(board, meter, 1.0) == pytest.approx(9.0)
    load(supply=1, rail=0)
    assert meter.look() is None
    board.now += FIND_AGAIN_S
    meter.look()
    assert mean(board, meter, 1.0) == pytest.approx(9.0)


def test_a_counter_that_leaps_is_no_burst_of_energy(board: Board) -> None:
    rapl = "powercap/intel-rapl:0"
    board.put(rapl, name="psys", energy_uj=0, max_energy_range_uj=262_143_328_850)
    meter = board.meter()
    board.put(rapl, energy_uj=2**37)
    board.now = 60.0
    assert meter.look() is None, "no board draws as much"
    board.put(rapl, energy_uj=2**37 + 120_000_000)
    board.now = 120.0
    after = meter.look()
    assert after is not None
    assert after.joules == 120.0


def test_a_cable_that_is_pulled_out_makes_the_battery_tell_for_the_board_and_what_each_told_is_not_mixed(
    board: Board,
) -> None:
    board.put("power_supply/BAT0", type="Battery", status="Charging", power_now=9_000_000)
    zone = "powercap/intel-rapl:0"
    board.put(zone, name="package-0", energy_uj=5_000_000, max_energy_range_uj=10_000_000)
    meter = board.meter()
    assert meter.scope == "package"
    before = meter.look()
    board.put("power_supply/BAT0", status="Discharging")
    board.put(zone, energy_uj=6_000_000)
    board.now += FIND_AGAIN_S
    assert watts(before, meter.look()) is None
    assert meter.scope == "board"
    assert watts(before, meter.look()) is None
    assert mean(board, meter, 1.0) == pytest.approx(9.0)


def test_no_time_no_power(board: Board) -> None:
    board.put("hwmon/hwmon0", name="ina226", power1_input=1_000_000)
    meter = board.meter()
    assert mean(board, meter, 0.0) is None


def test_energy_per_request_is_of_the_requests_since_the_last_look(board: Board) -> None:
    board.put("hwmon/hwmon0", name="ina226", power1_input=2_000_000)
    energy = EnergyMeter(board.meter())
    board.now = 1.0
    first = energy.since_last_look(100)  # how many came before the meter was there is not known
    assert first is not None
    assert first.watts == pytest.approx(2.0)
    assert first.joules_per_request is None
    board.now = 11.0
    second = energy.since_last_look(140)
    assert second is not None
    assert second.joules_per_request == pytest.approx(20.0 / 40)
    board.now = 12.0
    restarted = energy.since_last_look(3)
    assert restarted is not None
    assert restarted.joules_per_request is None


def test_without_a_sensor_there_is_no_energy(board: Board) -> None:
    assert EnergyMeter(board.meter()).since_last_look(5) is None
