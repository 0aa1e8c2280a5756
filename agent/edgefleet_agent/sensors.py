"""Stage 9, health: receives what Linux shows of this board's temperature and clock, hands on figures, or None where it shows nothing.

Source: kernel ``Documentation/driver-api/thermal/sysfs-api.rst`` and ``admin-guide/pm/cpufreq.rst``.
"""

from __future__ import annotations

from pathlib import Path

MOST_CELSIUS = 200.0  # no processor lives there: what reads more is a sensor that is broken, or not there
THROTTLED_BELOW = 0.8  # of the maximum clock, right after a load that wants all of it


def hottest_celsius(sys_root: Path = Path("/sys")) -> float | None:
    """The highest reading of all thermal zones in degrees Celsius; None when the board has no readable zone."""
    readings = []
    for zone in sorted(sys_root.glob("class/thermal/thermal_zone*/temp")):
        value = _number(zone)
        # Sensors that are switched off read 0 or far below zero, or all ones.
        if value is not None and 0 < value <= MOST_CELSIUS * 1000:
            readings.append(value / 1000.0)
    return max(readings, default=None)


def throttled(sys_root: Path = Path("/sys")) -> bool | None:
    """Whether every core runs clearly below its maximum clock just now; None when the board does not show its clocks."""
    shares = []
    for policy in sorted(sys_root.glob("devices/system/cpu/cpufreq/policy*")):
        current, most = _number(policy / "scaling_cur_freq"), _number(policy / "cpuinfo_max_freq")
        if current and most:
            shares.append(current / most)
    return max(shares) < THROTTLED_BELOW if shares else None


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None
