"""Stage 6, verify: what a board is and what an artifact needs of it. Pure: receives two descriptions, hands on the differences.

Both the controller (before it assigns) and the agent (before it downloads) call :func:`mismatches`, so that they refuse alike.
Reading the real board is :mod:`edgefleet_agent.board`'s work.
"""

from __future__ import annotations

import re

import msgspec


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """What a board is. ``engines`` maps engine name to its version, for engines that load on this board; ``build_keys`` maps those of them
    that need a plan made on the board to what a plan depends on (engine, driver, processor);
    ``cpu_features`` are the kernel's names (avx2, avx512_vnni, asimddp, ...); memory in bytes. ``provides`` is what the agent's
    package brings for agents of other versions: python, the launcher and the Python distributions, by name and version."""

    arch: str
    cpu_features: tuple[str, ...] = ()
    engines: dict[str, str] = {}
    build_keys: dict[str, str] = {}
    memory_bytes: int = 0
    agent_version: str = ""
    provides: dict[str, str] = {}


class Requirement(msgspec.Struct, frozen=True, kw_only=True):
    """What an artifact needs. Signed with it. ``engine_version`` is a comma-separated list of bounds such as
    ``>=1.20,<2``; empty means any, and so does an empty architecture or engine. ``provides`` are such bounds by name."""

    arch: str = ""
    engine: str = ""
    engine_version: str = ""
    cpu_features: tuple[str, ...] = ()
    memory_bytes: int = 0
    provides: dict[str, str] = {}


_BOUND = re.compile(r"^(>=|<=|==|!=|>|<)\s*([0-9][0-9A-Za-z.+-]*)$")


def mismatches(need: Requirement, board: Fingerprint) -> list[str]:
    """Say why ``board`` can't run an artifact that needs ``need``; an empty list means that it can."""
    reasons = []
    if need.arch and need.arch != board.arch:
        reasons.append(f"needs architecture {need.arch}, the board is {board.arch}")
    missing = sorted(set(need.cpu_features) - set(board.cpu_features))
    if missing:
        reasons.append(f"needs CPU features {', '.join(missing)}")
    have = board.engines.get(need.engine)
    if not need.engine:
        pass
    elif have is None:
        reasons.append(f"needs engine {need.engine}, the board has {', '.join(sorted(board.engines)) or 'none'}")
    elif not version_within(have, need.engine_version):
        reasons.append(f"needs {need.engine} {need.engine_version}, the board has {have}")
    if board.memory_bytes and need.memory_bytes > board.memory_bytes:
        reasons.append(f"needs {need.memory_bytes} bytes of memory, the board has {board.memory_bytes}")
    for name, bounds in sorted(need.provides.items()):
        provided = board.provides.get(name)
        if provided is None or not version_within(provided, bounds):
            reasons.append(
                f"needs {name} {bounds}".rstrip() + f" of the board's package, which has {provided or 'none'}"
            )
    return reasons


def version_within(version: str, bounds: str) -> bool:
    """Whether ``version`` satisfies every bound in ``bounds`` (``>=1.20,<2``). An unreadable bound is not satisfied."""
    for part in filter(None, (p.strip() for p in bounds.split(","))):
        match = _BOUND.match(part)
        if match is None:
            return False
        operator, wanted = match.groups()
        a, b = _numbers(version), _numbers(wanted)
        width = max(len(a), len(b))
        order = _compare(a + (0,) * (width - len(a)), b + (0,) * (width - len(b)))
        accepted = {
            ">=": order >= 0,
            "<=": order <= 0,
            "==": order == 0,
            "!=": order != 0,
            ">": order > 0,
            "<": order < 0,
        }
        if not accepted[operator]:
            return False
    return True


def readable_bounds(bounds: str) -> bool:
    """Whether :func:`version_within` understands every bound: one that it does not would never be satisfied."""
    return all(_BOUND.match(part.strip()) for part in bounds.split(",") if part.strip())


def _numbers(version: str) -> tuple[int, ...]:
    leading = re.match(r"[0-9.]*", version)
    return tuple(int(n) for n in (leading.group() if leading else "").split(".") if n)


def _compare(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return (a > b) - (a < b)
