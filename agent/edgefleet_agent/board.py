"""Stage 6, verify: receives the machine it runs on, hands on the board's fingerprint, which artifacts are held against.

Engines are proven by loading each in a process of its own: an installed library that does not load on this CPU
(illegal instruction, missing driver) is no engine, and the resident agent imports none of them.
"""

from __future__ import annotations

import logging
import os
import platform
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
from edgefleet_shared.errors import EnvironmentProblem
from edgefleet_shared.fingerprint import Fingerprint, architecture
from edgefleet_shared.malformed import MALFORMED
from edgefleet_shared.threads import ROOM_HINT

from edgefleet_agent import __version__, sysfs
from edgefleet_agent.sandbox import child_environment, describe_exit

log = logging.getLogger(__name__)

PROBE_LIMIT_S = 45  # for each engine; those that hang do so side by side, and systemd gives the agent 90 s to start


class EngineProbe(msgspec.Struct, frozen=True):
    """What one engine is on this board: its version when it loads, else what is missing; what its plans depend on, if it needs any."""

    name: str
    version: str | None
    missing: str
    build_key: str = ""


def read_fingerprint() -> Fingerprint:
    """What this board is. Takes about half a second per installed engine: call once per start, not per message.

    Raises:
        EnvironmentProblem: the board has no room for the processes that find out.
    """
    probes = probe_engines()
    return Fingerprint(
        arch=architecture(platform.machine(), 8 * struct.calcsize("P")),
        cpu_features=cpu_features(),
        engines={p.name: p.version for p in probes if p.version is not None},
        build_keys={p.name: p.build_key for p in probes if p.build_key},
        memory_bytes=memory_bytes(),
        agent_version=__version__,
        provides=provided(),
    )


def provided() -> dict[str, str]:
    """What the package brings for agents of other versions (:mod:`edgefleet_agent.provided`); empty when it can't be told."""
    child = _asked("edgefleet_agent.provided")
    try:
        return msgspec.json.decode(child.stdout, type=dict[str, str])
    except MALFORMED:
        log.error(
            "what the package provides is not known", extra={"reason": child.stderr[-300:].decode(errors="replace")}
        )
        return {}


def _asked(module: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """A module's answer, from a process of its own. Raises EnvironmentProblem: it can't be started."""
    try:
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd="/",
            env=child_environment(),
            check=False,
        )
    except OSError as exc:
        raise EnvironmentProblem(f"can't run {module} as a child: {exc.strerror or exc}", hint=ROOM_HINT) from exc


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """The kernel's names of what the CPU can do (``flags`` on x86, ``Features`` on Arm), sorted; empty when it shows none."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return ()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted(value.split()))
    return ()


def memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """The board's memory; 0 when the kernel does not show it."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return 0
    fields = [line.split() for line in lines if line.startswith("MemTotal:")]
    return int(fields[0][1]) * 1024 if fields else 0


def kernel_boot(source: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """The kernel's name of this start of the board; empty when it gives none."""
    return sysfs.text(source)


def probe_engines() -> tuple[EngineProbe, ...]:
    """Every engine that an adapter is installed for, each loaded once in a process of its own.

    Raises:
        EnvironmentProblem: the board has no room for the processes. What it can't look for, it would tell as missing.
    """
    child = _asked("edgefleet_agent.runtime.engines.probe", str(PROBE_LIMIT_S))
    if child.returncode == os.EX_TEMPFAIL:
        raise EnvironmentProblem("this board has no room for the processes that find out its engines", hint=ROOM_HINT)
    found = []
    for line in child.stdout.splitlines():
        try:
            found.append(msgspec.json.decode(line, type=EngineProbe))
        except MALFORMED:
            log.error("the probe reported nonsense", extra={"reason": line[:200].decode(errors="replace")})
    if child.returncode:
        last = child.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
        log.error("the probe of the engines ended", extra={"reason": f"{describe_exit(child.returncode)}: {last}"})
    return tuple(found)
