"""Cuts through an enrolment: what is left is a board that is enrolled, whole, or one that can be enrolled again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from chaos.board import STATE
from chaos.depot import DEVICE, Depot
from chaos.stories import enrolment
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from edgefleet_agent import settings, verify
from edgefleet_shared import atomic
from edgefleet_shared.errors import EnvironmentProblem
from support.disk import MemoryDisk, Tree, key_of, remains


@dataclass
class EnrolmentExplorer:
    """Like :class:`chaos.explorer.Explorer`, for what ``fleet-agent enroll`` does."""

    depot: Depot
    make_disk: Callable[[Tree], MemoryDisk] = MemoryDisk
    limit: int = 20
    met: int = 0
    recovered: int = 0
    failures: list[str] = field(default_factory=list)

    def explore(self, depth: int) -> None:
        seen: set[int] = set()
        todo: deque[tuple[Tree, int, str]] = deque([({}, 0, "enrolment")])
        while todo and len(self.failures) < self.limit:
            tree, cuts, trail = todo.popleft()
            disk = self.make_disk(tree)
            self.recovered += cuts > 0

            def after(operation: str, path: str, disk=disk, cuts=cuts, trail=trail) -> None:
                if cuts >= depth:
                    return
                for left in remains(disk):
                    self.met += 1
                    if (key := key_of(_without_chance(left))) not in seen:
                        seen.add(key)
                        todo.append((left, cuts + 1, f"{trail}; cut after {len(disk.log)} {operation} {path}"))

            disk.after = after
            try:
                if not is_enrolled(disk):
                    enrolment(self.depot, disk)
                    assert is_enrolled(disk), "it can't be enrolled again"
            except Exception as exc:  # noqa: BLE001 - whatever goes wrong is a finding
                self.failures.append(f"{trail}: {type(exc).__name__}: {exc}")


def _without_chance(tree: Tree) -> Tree:
    """The private key is another one each time: two trees are the same when theirs are equally long and equally whole."""
    return {
        path: content if content is None or "agent.key" not in path
        else b"%d bytes, %d of them zero" % (len(content), content.count(0))
        for path, content in tree.items()
    }  # fmt: skip


def is_enrolled(disk: MemoryDisk) -> bool:
    """Whether the settings are there; then everything must be.

    Raises:
        AssertionError, or what reading a torn file raises.
    """
    files = disk.calm()
    try:
        found = settings.read(STATE, files=files)
    except EnvironmentProblem as exc:
        if "is not enrolled" not in exc.message:
            raise
        return False
    assert found.device == DEVICE
    load_pem_private_key(atomic.read(STATE / "identity" / "agent.key", files=files), None)
    assert atomic.read(STATE / "identity" / "agent.pem", files=files) == b"a certificate"
    assert atomic.read(STATE / "identity" / "ca.pem", files=files) == b"a CA"
    msgspec.json.decode(verify.read_root(STATE, files=files))
    assert files.is_folder(STATE / "metadata")
    return True
