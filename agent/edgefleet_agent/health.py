"""Stage 9, health: what the board measures. Receives the kernel's files and the runtime's counters, hands on figures."""

from __future__ import annotations

import os
from pathlib import Path

from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.messages import Health

from edgefleet_agent.runtime.control import RuntimeClient, StatusReport


class CpuMeter:
    """Share of all cores that was busy since the last look, from ``/proc/stat``."""

    def __init__(self, source: Path = Path("/proc/stat")) -> None:
        self._source = source
        self._busy, self._all = self._read()

    def share(self) -> float | None:
        """0 to 1; None when nothing has passed."""
        busy, everything = self._read()
        passed, used = everything - self._all, busy - self._busy
        self._busy, self._all = busy, everything
        return max(0.0, min(1.0, used / passed)) if passed > 0 else None

    def _read(self) -> tuple[int, int]:
        # proc(5): user nice system idle iowait irq softirq steal ...
        fields = [int(f) for f in self._source.read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields) - fields[3] - fields[4], sum(fields)


def memory_available_bytes(source: Path = Path("/proc/meminfo")) -> int | None:
    for line in source.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def celsius(root: Path = Path("/sys/class/thermal")) -> float | None:
    """The hottest thermal zone; None where there is none."""
    found = []
    for zone in sorted(root.glob("thermal_zone*/temp")):
        try:
            found.append(int(zone.read_text()) / 1000)
        except (OSError, ValueError):
            continue  # a sensor that is switched off
    return max(found, default=None)


def disk_free_bytes(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def measure(state: Path, client: RuntimeClient, meter: CpuMeter) -> tuple[Health, StatusReport | None]:
    """One set of figures, and the runtime's status behind them (None when it does not answer)."""
    status: StatusReport | None
    try:
        status = client.status()
    except EdgefleetError:
        status = None
    serving = next((v for v in status.versions if v.serving), None) if status else None
    return Health(
        model=serving.model if serving else "",
        version=serving.version if serving else "",
        requests=serving.requests if serving else 0,
        failed=serving.failed if serving else 0,
        crashes=serving.crashes if serving else 0,
        p50_ms=serving.p50_ms if serving else None,
        p95_ms=serving.p95_ms if serving else None,
        cpu_share=meter.share(),
        memory_available_bytes=memory_available_bytes(),
        disk_free_bytes=disk_free_bytes(state),
        celsius=celsius(),
        runtime_up=status is not None,
    ), status
