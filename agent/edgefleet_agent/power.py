"""Stage 9, health: power. Receives what Linux shows of this board's consumption, hands on joules, or None where it shows nothing.

What is asked, and the first that answers is taken; looked at again every minute, because drivers load late and cables are pulled out:

1. a hardware monitor that measures the board's supply (INA226, INA3221 and the like, ``hwmon``): the channel labelled as the input where
   there is one on any chip (most Jetsons: ``VDD_IN``), else the sum of the channels of all chips of one kind (AGX Orin, AGX Xavier). Scope *board*.
2. the batteries that are being discharged, together (``power_supply``). Scope *board*.
3. RAPL's counter of the platform (``psys``, scope *board*) or of the packages (scope *package*: the processor alone, so no measure
   of a board's budget). Readable by root only on most kernels.

Source: kernel ``Documentation/hwmon/sysfs-interface.rst``, ``hwmon/ina3221.rst``, ``power/power_supply_class.rst``, ``power/powercap/powercap.rst``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from edgefleet_agent import sysfs

Scope = Literal["board", "package"]

FIND_AGAIN_S = 60.0
COUNTED_EVERY_S = 0.1  # or oftener, by every counter
MOST_WATTS = 2000.0  # no board draws as much; a counter that says so was reset
# Labels of the channel through which everything on the board is fed; the other channels are parts of it.
_INPUT = re.compile(r"^(vdd_in|pom_5v_in|.*_in|input|total|vin)$", re.IGNORECASE)
# Of an INA3221: what follows its three channels are their shunts' microvolts, and what the driver adds up.
_INA3221_CHANNELS = ("1", "2", "3")
_MONITORS = re.compile(r"^(ina|ltc294|max3440|adm12|pac19|isl28022)", re.IGNORECASE)


class Usage(NamedTuple):
    """Energy since its source was chosen, when that was read (seconds of the meter's own clock), and which choice it was."""

    joules: float
    at_s: float
    choice: int


class Source(Protocol):
    """Where figures come from."""

    @property
    def name(self) -> str: ...
    @property
    def scope(self) -> Scope: ...
    def read(self, now_s: float) -> float | None:
        """Joules since the source was made; None when it stopped answering."""


class PowerMeter:
    """Counts the energy that this board uses.

    Instantaneous sensors are integrated between two looks, so look as often as the load changes; counters count by themselves.

    Args:
        sys_root: where sysfs is.
        clock: seconds, monotonic.
    """

    def __init__(self, sys_root: Path = Path("/sys"), clock: Callable[[], float] = time.monotonic) -> None:
        self._sys_root, self._clock = sys_root, clock
        self._chosen_at = clock()
        self._source, self._choice = _find(sys_root, self._chosen_at), 0

    @property
    def source(self) -> str:
        """What measures, for people; empty when nothing does."""
        return self._source.name if self._source else ""

    @property
    def scope(self) -> Scope | None:
        """What is measured: the whole board, or the processor's package alone."""
        return self._source.scope if self._source else None

    def look(self) -> Usage | None:
        """Energy so far; None where nothing measures it."""
        now = self._clock()
        joules = self._source.read(now) if self._source else None
        if now - self._chosen_at >= FIND_AGAIN_S and self._choose_again(now, answered=joules is not None):
            return None
        return None if joules is None else Usage(joules, now, self._choice)

    def _choose_again(self, now: float, *, answered: bool) -> bool:
        """Whether another source is taken from now on; the same one too when it stopped answering: its files may have other names now."""
        self._chosen_at = now
        found = _find(self._sys_root, now)
        if found is None or (answered and self._source is not None and found.name == self._source.name):
            return False
        self._source, self._choice = found, self._choice + 1
        return True


def used_joules(before: Usage | None, after: Usage | None) -> float | None:
    """Energy between two looks; None when either is missing or another source answers by now."""
    if before is None or after is None or before.choice != after.choice:
        return None
    return after.joules - before.joules


def watts(before: Usage | None, after: Usage | None) -> float | None:
    """Mean power between two looks; None where :func:`used_joules` is, or no time passed."""
    joules = used_joules(before, after)
    if joules is None or before is None or after is None or after.at_s <= before.at_s:
        return None
    return joules / (after.at_s - before.at_s)


def _find(sys_root: Path, now_s: float) -> Source | None:
    for find in (_supply_monitor, _battery, _rapl):
        source = find(sys_root, now_s)
        if source is not None:
            return source
    return None


class _Gauge:
    """An instantaneous reading in watts, integrated between looks (trapezoids)."""

    scope: Scope = "board"

    def __init__(self, name: str, gauge: Callable[[], float | None], now_s: float) -> None:
        self.name = name
        self._gauge, self._then, self._joules = gauge, now_s, 0.0
        self._last = self._plausible()

    def _plausible(self) -> float | None:
        value = self._gauge()
        return None if value is None or abs(value) > MOST_WATTS else value

    def read(self, now_s: float) -> float | None:
        value = self._plausible()
        if value is None or self._last is None:
            self._last = value
            return None
        self._joules += (value + self._last) / 2 * (now_s - self._then)
        self._last, self._then = value, now_s
        return self._joules


class _Counters:
    """Energy counters in microjoules, each of which starts again at its own limit."""

    def __init__(self, name: str, scope: Scope, counters: list[tuple[Path, int]], now_s: float) -> None:
        self.name, self.scope = name, scope
        self._counters, self._then = counters, now_s
        self._last = [sysfs.number(path) for path, _ in counters]
        self._joules = 0.0

    def read(self, now_s: float) -> float | None:
        passed_s, self._then = now_s - self._then, now_s
        used, known = 0.0, True
        for index, (path, limit) in enumerate(self._counters):
            value, before = sysfs.number(path), self._last[index]
            self._last[index] = value
            joules = None if value is None or before is None else _counted(before, value, limit, passed_s)
            used, known = used + (joules or 0.0), known and joules is not None
        if not known:
            return None
        self._joules += used
        return self._joules


def _counted(before: float, value: float, limit: int, passed_s: float) -> float | None:
    """Joules between two looks at a counter; None when they are more than any board draws: it leapt, or began anew without having come to its limit,
    after a sleep or with its driver."""
    joules = (value - before if value >= before else value - before + limit) / 1e6
    # Two looks may lie closer together than what it is counted in.
    return joules if 0 <= joules <= MOST_WATTS * max(passed_s, COUNTED_EVERY_S) else None


class _Channel(NamedTuple):
    label: str
    watts: Callable[[], float | None]


def _supply_monitor(sys_root: Path, now_s: float) -> Source | None:
    kinds: dict[str, list[_Channel]] = {}
    for chip in sysfs.found(sys_root, "class/hwmon/hwmon*"):
        chip = chip.resolve()  # as its device: who has which number may change with its driver
        name = sysfs.text(chip / "name")
        if _MONITORS.match(name):
            # A channel that nothing is connected to has files, and no value.
            kinds.setdefault(name, []).extend(c for c in _channels(chip, name) if c.watts() is not None)
    for name, channels in kinds.items():
        for channel in channels:
            if _INPUT.match(channel.label):
                return _Gauge(f"{name} {channel.label}", channel.watts, now_s)
    # Chips of one kind measure what lies side by side; those of two kinds may measure the same.
    for name, channels in kinds.items():
        if channels:
            return _Gauge(f"{name} {len(channels)} channels", partial(_together, channels), now_s)
    return None


def _together(channels: list[_Channel]) -> float | None:
    total = 0.0
    for channel in channels:
        watts_now = channel.watts()
        if watts_now is None:
            return None
        total += watts_now
    return total


def _channels(chip: Path, name: str) -> list[_Channel]:
    """A monitor's channels: those that give power, else those that give voltage and current."""
    found = [
        _Channel(sysfs.text(path.with_name(path.name.replace("input", "label"))), partial(_scaled, path, 1e-6))
        for path in sysfs.found(chip, "power*_input")
    ]
    if found:
        return found
    for amperes in sysfs.found(chip, "curr*_input"):
        number = amperes.name.removeprefix("curr").removesuffix("_input")
        if name == "ina3221" and number not in _INA3221_CHANNELS:
            continue
        label = sysfs.text(chip / f"in{number}_label") or sysfs.text(chip / f"curr{number}_label")
        found.append(_Channel(label, partial(_product, chip / f"in{number}_input", amperes, 1e-3)))
    return found


def _battery(sys_root: Path, now_s: float) -> Source | None:
    supplies = sysfs.found(sys_root, "class/power_supply/*")
    # A mouse has a battery too, and tells of it here.
    batteries = [
        s for s in supplies if sysfs.text(s / "type") == "Battery" and sysfs.text(s / "scope").lower() != "device"
    ]
    gauge = partial(_discharged, batteries)
    if gauge() is None:
        return None
    return _Gauge(f"battery {'+'.join(battery.name for battery in batteries)}", gauge, now_s)


def _discharged(batteries: list[Path]) -> float | None:
    """What flows out of them together; None while one is charged, which is by a cable that feeds the board too, or does not tell."""
    statuses = {battery: sysfs.text(battery / "status") for battery in batteries}
    if "Charging" in statuses.values():
        return None
    flows = [_flow(battery) for battery, status in statuses.items() if status == "Discharging"]
    known = [abs(flow) for flow in flows if flow is not None]
    return sum(known) if known and len(known) == len(flows) else None


def _flow(battery: Path) -> float | None:
    """Watts, below zero for what flows out where the driver says it so."""
    direct = _scaled(battery / "power_now", 1e-6)
    return direct if direct is not None else _product(battery / "voltage_now", battery / "current_now", 1e-6)


def _rapl(sys_root: Path, now_s: float) -> Source | None:
    zones = {zone: sysfs.text(zone / "name") for zone in sysfs.found(sys_root, "class/powercap/intel-rapl:*")}
    platform = [zone for zone, name in zones.items() if name == "psys"]
    packages = [zone for zone, name in zones.items() if name.startswith("package")]
    scope: Scope = "board" if platform else "package"
    counters = [(z / "energy_uj", int(sysfs.number(z / "max_energy_range_uj") or 0)) for z in platform[:1] or packages]
    if not counters or any(sysfs.number(path) is None for path, _ in counters):
        return None
    return _Counters("RAPL psys" if platform else "RAPL package", scope, counters, now_s)


def _product(volts: Path, amperes: Path, unit: float) -> float | None:
    """Watts out of two files, each in ``unit`` of volt and of ampere."""
    first, second = _scaled(volts, unit), _scaled(amperes, unit)
    return None if first is None or second is None else first * second


def _scaled(path: Path, unit: float) -> float | None:
    value = sysfs.number(path)
    return None if value is None else value * unit
