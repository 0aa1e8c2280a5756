"""Stage 2, compile: vendors' programs. Receives what a target needs, hands on where it is and its version.

Compilers that no package index has are installed by their makers' own means and found on PATH. Which one it was is part of a compiled
model's key, by version and by the program's content.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec
from edgefleet_shared.errors import ToolchainUnusable
from edgefleet_shared.fingerprint import version_within

ASK_LIMIT_S = 30.0
UNKNOWN = "unknown"


class MissingTool(ToolchainUnusable):
    """A vendor's program is not on this machine."""

    code = "tool_missing"


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A vendor's program.

    ``ask``: arguments that make it tell its version, which ``version`` finds in what it prints (one group); both empty: a file
    ``version_file``, relative to the folder that the program really lies in, tells; all empty: it can't be asked. ``within``: the versions that
    the adapter was written for. ``get``: where it comes from. ``only_for``: the precision that needs it; empty: any. ``variables``: of the
    environment, as patterns such as ``ASCEND_*``: what its maker's set-up exports and it does not run without.
    """

    name: str
    get: str
    ask: tuple[str, ...] = ()
    version: str = ""
    version_file: str = ""
    within: str = ""
    only_for: str = ""
    variables: tuple[str, ...] = ()


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A program on this machine. ``version`` may be :data:`UNKNOWN`; ``content`` is a hash of the program's file; ``variables`` are those of this
    process that the program wants, by name."""

    name: str
    path: str
    version: str
    content: str
    variables: dict[str, str] = {}


def find(tool: Tool) -> Found:
    """The program, asked for its version.

    Raises:
        MissingTool: it is not on PATH. ToolchainUnusable: it does not answer, says nothing that is a version, or one that the adapter does not know.
    """
    path = shutil.which(tool.name)
    if path is None:
        raise MissingTool(f"{tool.name} is not on PATH", hint=tool.get)
    version = _version(tool, Path(path))
    if tool.within and version != UNKNOWN and not version_within(version, tool.within):
        raise ToolchainUnusable(
            f"{tool.name} at {path} has version {version}, this target knows {tool.within}", hint=tool.get
        )
    with open(path, "rb") as stream:
        content = hashlib.sha256(stream.read()).hexdigest()[:16]
    variables = {k: v for k, v in os.environ.items() if any(fnmatchcase(k, pattern) for pattern in tool.variables)}
    return Found(name=tool.name, path=path, version=version, content=content, variables=variables)


def find_all(tools: Sequence[Tool], precision: str) -> tuple[Found, ...]:
    """All of them that a precision needs; raises as :func:`find`."""
    return tuple(find(tool) for tool in tools if tool.only_for in ("", precision))


def _version(tool: Tool, path: Path) -> str:
    if tool.version_file:
        file = path.resolve().parent / tool.version_file
        told = file.read_text(errors="replace") if file.is_file() else ""
    elif tool.ask:
        told = _asked(tool, path)
    else:
        return UNKNOWN
    found = re.search(tool.version, told)
    if found:
        return found[1]
    if tool.version_file:
        return UNKNOWN  # another edition of the same program may keep it elsewhere
    first = next((line.strip() for line in told.splitlines() if line.strip()), "nothing")
    raise ToolchainUnusable(f"{tool.name} at {path} tells no version: {first[:200]!r}", hint=tool.get)


def _asked(tool: Tool, path: Path) -> str:
    try:
        ended = subprocess.run(
            [str(path), *tool.ask], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=ASK_LIMIT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ToolchainUnusable(f"{tool.name} at {path} does not answer: {exc}", hint=tool.get) from exc
    return ended.stdout.decode(errors="replace")
