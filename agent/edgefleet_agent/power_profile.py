"""Stage 8, swap: the class's power profile. Receives what serves, hands on to the kernel the processor's governor, its highest clock, and how long
it may take to wake up.

Writing there is root's, and the agent is not: a service of its own (``fleet-power.service``, started whenever the slots change) does
this and nothing else. What it reads was written by the agent, so it is held against what the kernel itself offers: a governor
of the kernel's list, a clock within the processor's own limits. What was there before is kept until the next boot, and put
back when no profile is asked for.

Source: kernel ``Documentation/admin-guide/pm/cpufreq.rst``, ``driver-api/thermal/sysfs-api.rst``, ``power/pm_qos_interface.rst`` with
``ABI/testing/sysfs-devices-power``.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
from edgefleet_shared import atomic
from edgefleet_shared.artifact import PowerProfile
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem
from edgefleet_shared.malformed import MALFORMED

from edgefleet_agent import slots, sysfs

KEPT = Path("/run/fleet-power/before.json")
_WAKES_KEPT = "wakes.json"  # beside it
_CPUS = "devices/system/cpu"
_POLICIES = f"{_CPUS}/cpufreq"
_MOST = "cpuinfo_max_freq"
_COOLING = re.compile(r"cpufreq|^Processor$")  # what slows processors down, by the names of Arm's driver and of ACPI's
_GOVERNOR, _CLOCK, _LEAST = "scaling_governor", "scaling_max_freq", "scaling_min_freq"
_WAKE = "pm_qos_resume_latency_us"
_ANY_WAKE, _NO_WAKE = "0", "n/a"  # how the kernel writes that there is no limit, and that a processor may not sleep


_BeforeT = TypeVar("_BeforeT")


class Before(msgspec.Struct, frozen=True):
    """What a cpufreq policy was set to before any profile: governor, highest and lowest clock in kHz, 0 where that is not known."""

    governor: str
    max_khz: int
    min_khz: int = 0


def wanted(state: Path) -> PowerProfile:
    """The profile of the artifact that serves; an empty one where nothing serves.

    Raises:
        ArtifactError: the slots or the artifact are damaged.
    """
    serving = slots.read(state).serving
    if serving is None:
        return PowerProfile()
    layout = slots.artifacts(state)
    return layout.config(layout.manifest(serving.manifest)).power


def asked_mhz(state: Path) -> int:
    """The highest clock that is asked of the board now; 0 where there is no limit, or none that can be read."""
    try:
        return wanted(state).max_clock_mhz
    except EdgefleetError:
        return 0


def apply(profile: PowerProfile, sys_root: Path = Path("/sys"), kept: Path = KEPT) -> list[str]:
    """Set every cpufreq policy and every processor as the profile says; what it leaves open goes back to what it was before any profile.

    Returns:
        what was changed, for people; empty when all is as it should be.

    Raises:
        EnvironmentProblem: the kernel offers no such governor, clock or limit (then nothing was changed), or refuses to be written (then
            all is as it was before any profile, as far as it lets).
    """
    # All is held against the kernel's limits before the first is written, and what is refused all the same is undone: never half a profile.
    plan = _plan(profile, sys_root, kept)
    try:
        return [f"{owner}: {path.name} {value}" for owner, path, value in plan if _set(path, value)]
    except EnvironmentProblem:
        _undo(sys_root, kept)
        raise


def _undo(sys_root: Path, kept: Path) -> None:
    """Put back what was there before any profile, but for what the kernel refuses."""
    for _, path, value in _plan(PowerProfile(), sys_root, kept):
        with suppress(EnvironmentProblem):
            _set(path, value)


def _plan(profile: PowerProfile, sys_root: Path, kept: Path) -> list[tuple[str, Path, str]]:
    """(owner, file, value) of all that the profile needs."""
    return [*_clocks(profile, sys_root, kept), *_wakes(profile, sys_root, kept.with_name(_WAKES_KEPT))]


def _clocks(profile: PowerProfile, sys_root: Path, kept: Path) -> list[tuple[str, Path, str]]:
    """(policy, file, value) of all that clocks need."""
    # A cluster whose cores are switched off answers nothing (EBUSY), and has no clock to be set.
    policies = [
        p for p in sysfs.found(sys_root / _POLICIES, "policy*") if sysfs.text(p / _GOVERNOR) and _khz(p / _CLOCK)
    ]
    if not policies:
        if profile.governor or profile.max_clock_mhz:
            raise EnvironmentProblem(
                "this board's kernel does not scale clocks", hint="the class's power profile has no effect"
            )
        return []
    before = _before(policies, kept, is_cooled=_is_cooled(sys_root))
    targets = [(policy, _target(policy, profile, before[policy.name])) for policy in policies]
    return [
        (policy.name, policy / name, value) for policy, target in targets for name, value in _writes(policy, target)
    ]


def _wakes(profile: PowerProfile, sys_root: Path, kept: Path) -> list[tuple[str, Path, str]]:
    """(processor, file, value) of all that keeps processors from deep sleep."""
    files = {p.parts[-3]: p for p in sysfs.found(sys_root / _CPUS, f"cpu[0-9]*/power/{_WAKE}") if sysfs.text(p)}
    if not files and profile.max_wake_us is not None:
        raise EnvironmentProblem(
            "this board's kernel takes no limit for how long its processors may take to wake up",
            hint="the class's power profile has no effect",
        )
    before = _kept(kept, dict[str, str])
    if profile.max_wake_us is None and not before:
        return []  # nobody ever asked
    fresh = {name: sysfs.text(path) for name, path in files.items() if name not in before}
    before = _keep(kept, before | fresh) if fresh else before
    asked = _ANY_WAKE if profile.max_wake_us is None else str(profile.max_wake_us or _NO_WAKE)
    # What somebody else has made stricter is nobody's to loosen.
    return [(name, path, min(asked, before[name], key=_wake_us)) for name, path in files.items()]


def _wake_us(limit: str) -> float:
    """What the kernel's word for a limit allows, in µs."""
    return 0 if limit == _NO_WAKE else (int(limit) if limit.isdecimal() else 0) or math.inf


def _writes(policy: Path, target: Before) -> list[tuple[str, str]]:
    """Files and their values, in order: clocks before the governor, which must not get more in between than it is to have, and never the
    lowest clock above the highest, which older kernels refuse."""
    clocks = [(_CLOCK, str(target.max_khz))]
    if target.min_khz:
        clocks.insert(0 if target.min_khz <= _khz(policy / _CLOCK) else 1, (_LEAST, str(target.min_khz)))
    return [*clocks, (_GOVERNOR, target.governor)]


def _is_cooled(sys_root: Path) -> bool:
    """Whether the kernel holds clocks down just now because the board is hot."""
    return any(
        _COOLING.search(sysfs.text(device / "type")) and sysfs.number(device / "cur_state")
        for device in sysfs.found(sys_root, "class/thermal/cooling_device*")
    )


def _before(policies: list[Path], kept: Path, *, is_cooled: bool) -> dict[str, Before]:
    """What was set before any profile. On a board that is being cooled the highest clock reads as the kernel's own limit of the moment: put back
    later, it would keep the board slow that has long been cool."""
    highest = _MOST if is_cooled else _CLOCK
    known = _kept(kept, dict[str, Before])
    fresh = {
        p.name: Before(sysfs.text(p / _GOVERNOR), _khz(p / highest) or _khz(p / _CLOCK), _khz(p / _LEAST))
        for p in policies
        if p.name not in known
    }
    return _keep(kept, known | fresh) if fresh else known


def _kept(kept: Path, kind: type[dict[str, _BeforeT]]) -> dict[str, _BeforeT]:
    try:
        return msgspec.json.decode(kept.read_bytes(), type=kind)
    except (OSError, *MALFORMED):
        return {}


def _keep(kept: Path, before: dict[str, _BeforeT]) -> dict[str, _BeforeT]:
    atomic.make_folder(kept.parent)
    atomic.write(kept, msgspec.json.encode(before))
    return before


def _target(policy: Path, profile: PowerProfile, before: Before) -> Before:
    offered = sysfs.text(policy / "scaling_available_governors").split()
    if profile.governor and profile.governor not in offered:
        raise EnvironmentProblem(
            f"{policy.name} has no governor {profile.governor!r}", hint=f"it has {', '.join(offered) or 'none'}"
        )
    least, most = _khz(policy / "cpuinfo_min_freq"), _khz(policy / _MOST)
    khz = profile.max_clock_mhz * 1000
    if khz and khz < least:
        raise EnvironmentProblem(f"{policy.name} runs at {least // 1000} MHz or more, not at {profile.max_clock_mhz}")
    # A ceiling above what the processor can do is no ceiling.
    ceiling = min(khz, most or khz) if khz else before.max_khz
    return Before(profile.governor or before.governor, ceiling, min(before.min_khz, ceiling))


def _set(path: Path, value: str) -> bool:
    """Returns whether it was another before."""
    if sysfs.text(path) == value:
        return False
    try:
        path.write_text(value)  # sysfs: neither renamed nor synced
    except OSError as exc:
        hint = "this needs root" if isinstance(exc, PermissionError) else "the kernel refused it"
        raise EnvironmentProblem(f"can't set {path} to {value}: {exc.strerror}", hint=hint) from exc
    return True


def _khz(path: Path) -> int:
    text = sysfs.text(path)
    return int(text) if text.isdecimal() else 0
