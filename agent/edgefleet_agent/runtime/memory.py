"""How much memory there is for more: receives the kernel's files, hands on bytes, of the machine or of a control group that leaves less.

Source: kernel ``admin-guide/cgroup-v1/memory.rst``, ``admin-guide/cgroup-v2.rst``; proc(5), ``/proc/meminfo``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from edgefleet_agent import sysfs


class _Files(NamedTuple):
    """What a control group's figures are called; ``unused`` is a line of ``memory.stat``."""

    limit: str
    used: str
    unused: str


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


def available_memory_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that a new process could use: the machine's, or what a control group that this process is in leaves when that is less.

    Args:
        proc, groups: where procfs is, and the control groups of version 2, with those of version 1 in a folder for each controller.
    """
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            free = int(min(free, _left(groups / "memory", path, _VERSION_1)))
        elif not controllers:
            free = int(min(free, _left(groups, path, _VERSION_2)))
    return free


def _left(root: Path, path: str, files: _Files) -> float:
    """What the group at ``path`` and those above it leave. In a container the path may be the host's, of which nothing is here but the root."""
    left, folder = math.inf, root / path.lstrip("/")
    for group in (folder, *folder.parents):
        limit, used = sysfs.number(group / files.limit), sysfs.number(group / files.used)
        if limit is not None and used is not None:
            left = min(left, max(0.0, limit - used + _given_back(group / "memory.stat", files.unused)))
        if group == root:
            break
    return left


def _given_back(stat: Path, name: str) -> int:
    """Bytes of files that nobody has looked at for a while: they count as used, and go first."""
    for line in sysfs.text(stat).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return 0
