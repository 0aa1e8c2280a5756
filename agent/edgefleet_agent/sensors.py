"""Stage 9, health: receives what Linux shows of this board's temperature and clock, hands on figures, or None where it shows nothing.

Source: kernel ``Documentation/driver-api/thermal/sysfs-api.rst``, ``hwmon/k10temp.rst``, ``hwmon/coretemp.rst`` and
``admin-guide/pm/cpufreq.rst``.
"""

from __future__ import annotations

import re
from pathlib import Path

from edgefleet_agent import sysfs

MOST_CELSIUS = 200.0  # no processor lives there: what reads more is a sensor that is broken, or not there
# Drivers of processors that need not have a thermal zone; AMD's have none.
_PROCESSORS = re.compile(r"^(coretemp|k8temp|k10temp|zenpower|via_cputemp)$")
THROTTLED_BELOW = 0.8  # of the maximum clock, right after a load that wants all of it


def hottest_celsius(sys_root: Path = Path("/sys")) -> float | None:
    """The highest reading of all thermal zones and of the processor's own sensors in degrees Celsius; None when the board has none that can be
    read."""
    readings = []
    for sensor in (*sysfs.found(sys_root, "class/thermal/thermal_zone*/temp"), *_of_processors(sys_root)):
        value = sysfs.number(sensor)
        # Sensors that are switched off read 0 or far below zero, or all ones.
        if value is not None and 0 < value <= MOST_CELSIUS * 1000:
            readings.append(value / 1000.0)
    return max(readings, default=None)


def _of_processors(sys_root: Path) -> list[Path]:
    found = []
    for chip in sysfs.found(sys_root, "class/hwmon/hwmon*"):
        if _PROCESSORS.match(sysfs.text(chip / "name")):
            sensors = {
                path: sysfs.text(path.with_name(path.name.replace("input", "label")))
                for path in sysfs.found(chip, "temp*_input")
            }
            # Tctl is what the fan is driven by, on some up to 27 degrees above the die; those tell that too.
            has_die = "Tdie" in sensors.values()
            found += [path for path, label in sensors.items() if not (has_die and label == "Tctl")]
    return found


def throttled(sys_root: Path = Path("/sys"), most_mhz: int = 0) -> bool | None:
    """Whether every core runs clearly below its maximum clock just now; None when the board does not show its clocks, or holds them low.

    Args:
        most_mhz: the highest clock that the class's power profile lets it have; 0 for no such limit. The kernel's own
            ``scaling_max_freq`` is no measure: what cools the board lowers it too.
    """
    shares = []
    for policy in sysfs.found(sys_root, "devices/system/cpu/cpufreq/policy*"):
        current, most = sysfs.number(policy / "scaling_cur_freq"), sysfs.number(policy / "cpuinfo_max_freq")
        if current and most and not _holds_low(policy):
            most = min(most, most_mhz * 1000) if most_mhz > 0 else most
            shares.append(current / most)
    return max(shares) < THROTTLED_BELOW if shares else None


def _holds_low(policy: Path) -> bool:
    """Whether the governor keeps the lowest clock whatever is asked of the core. The P-state drivers use the same word for another one."""
    return sysfs.text(policy / "scaling_governor") == "powersave" and "pstate" not in sysfs.text(
        policy / "scaling_driver"
    )
