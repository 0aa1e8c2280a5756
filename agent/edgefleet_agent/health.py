"""Stage 9, health: what the board measures. Receives the kernel's files and the runtime's counters, hands on figures."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import NamedTuple

from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.files import DISK
from edgefleet_shared.messages import Health

from edgefleet_agent import power_profile, sensors
from edgefleet_agent.ports import ModelServer
from edgefleet_agent.power import PowerMeter, Scope, used_joules, watts
from edgefleet_agent.runtime.control import StatusReport, VersionState

# After commit: this many crashes of the engine's process over this many looks at its health mean that it regressed. Over several looks,
# because one that dies at each request may take longer to load than passes between two of them; those at which it only loads do not count.
REGRESSION_CRASHES = 3
REGRESSION_LOOKS = 12


class CpuMeter:
    """Share of all cores that was busy since the last look, from ``/proc/stat``."""

    def __init__(self, source: Path = Path("/proc/stat")) -> None:
        self._source = source
        self._before = self._read()

    def share(self) -> float | None:
        """0 to 1; None when nothing has passed, or the kernel does not tell."""
        before, self._before = self._before, self._read()
        if before is None or self._before is None:
            return None
        used, passed = (now - then for now, then in zip(self._before, before, strict=True))
        return max(0.0, min(1.0, used / passed)) if passed > 0 else None

    def _read(self) -> tuple[int, int] | None:
        """Busy and all, in ticks."""
        # proc(5): user nice system idle iowait irq softirq steal ...
        try:
            fields = [int(f) for f in self._source.read_text().split("\n", 1)[0].split()[1:9]]
            return sum(fields) - fields[3] - fields[4], sum(fields)
        except (OSError, ValueError, IndexError):
            return None


class CrashWatch:
    """Whether the engine of what serves keeps dying, from the runtime's counters."""

    def __init__(self) -> None:
        self._manifest = ""
        self._seen: deque[int] = deque(maxlen=REGRESSION_LOOKS + 1)  # its crashes so far, at each look

    def look(self, status: StatusReport | None) -> tuple[str, str] | None:
        """(manifest, why) when it ended :data:`REGRESSION_CRASHES` times or more in the last :data:`REGRESSION_LOOKS`, else None."""
        serving = next((v for v in status.versions if v.serving), None) if status else None
        if serving is None:
            return None
        if serving.manifest != self._manifest:
            self._manifest = serving.manifest
            self._seen.clear()
        elif self._seen and serving.crashes < self._seen[-1]:  # the runtime started again, and counts from nothing
            self._seen.clear()
            self._seen.append(0)
        elif self._seen and serving.state == VersionState.RESTARTING and serving.crashes == self._seen[-1]:
            return None
        self._seen.append(serving.crashes)
        crashed = self._seen[-1] - self._seen[0]
        if crashed < REGRESSION_CRASHES:
            return None
        return serving.manifest, f"the engine's process ended {crashed} times: {serving.last_problem}"


class Used(NamedTuple):
    """Between two looks: mean power, and the energy that came to each request, idling included."""

    watts: float | None
    joules_per_request: float | None


class EnergyMeter:
    """Power and energy per request between two looks."""

    def __init__(self, meter: PowerMeter | None = None) -> None:
        self._meter = meter or PowerMeter()
        self._before = self._meter.look()
        self._requests: int | None = None

    @property
    def scope(self) -> Scope | None:
        return self._meter.scope

    def since_last_look(self, requests: int | None) -> Used | None:
        """None where nothing measures.

        Args:
            requests: answered so far by the runtime; None when it does not answer.
        """
        before, self._before = self._before, self._meter.look()
        counted, self._requests = self._requests, requests
        joules = used_joules(before, self._before)
        if joules is None:
            return None
        # A runtime that started again counts from 0.
        served = requests - counted if requests is not None and counted is not None else 0
        return Used(watts(before, self._before), joules / served if served > 0 else None)


def memory_available_bytes(source: Path = Path("/proc/meminfo")) -> int | None:
    """What programs may still take; None when the kernel does not tell."""
    try:
        for line in source.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def disk_free_bytes(folder: Path) -> int | None:
    """What may still be written; None when the disk does not answer."""
    try:
        return DISK.free_bytes(folder)
    except OSError:
        return None


class Meters:
    """What is measured from one look to the next."""

    def __init__(self) -> None:
        self.cpu, self.energy = CpuMeter(), EnergyMeter()


def measure(state: Path, client: ModelServer, meters: Meters) -> tuple[Health, StatusReport | None]:
    """One set of figures, and the runtime's status behind them (None when it does not answer)."""
    status: StatusReport | None
    try:
        status = client.status()
    except EdgefleetError:
        status = None
    serving = next((v for v in status.versions if v.serving), None) if status else None
    used = meters.energy.since_last_look(sum(v.requests for v in status.versions) if status else None)
    return Health(
        model=serving.model if serving else "",
        version=serving.version if serving else "",
        requests=serving.requests if serving else 0,
        failed=serving.failed if serving else 0,
        crashes=serving.crashes if serving else 0,
        p50_ms=serving.p50_ms if serving else None,
        p95_ms=serving.p95_ms if serving else None,
        cpu_share=meters.cpu.share(),
        memory_available_bytes=memory_available_bytes(),
        disk_free_bytes=disk_free_bytes(state),
        celsius=sensors.hottest_celsius(),
        throttled=sensors.throttled(most_mhz=power_profile.asked_mhz(state)),
        watts=used.watts if used else None,
        joules_per_request=used.joules_per_request if used else None,
        power_scope=meters.energy.scope,
        drift=serving.drift if serving else None,
        runtime_up=status is not None,
    ), status
