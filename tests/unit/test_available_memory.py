"""What memory there is for a second version beside the one that serves, and for what clients send, on fake trees of the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgefleet_agent.runtime.body_room import ROOM_BYTES, room
from edgefleet_agent.runtime.memory import available_memory_bytes

MIB = 1 << 20
NO_LIMIT_1 = 9223372036854771712  # as version 1 writes it


def tree(root: Path, cgroup: str, **groups: dict[str, object]) -> int:
    """A machine with 1000 MiB free and such groups; what is found on it, in MiB."""
    files: dict[str, object] = {
        "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {1000 * 1024} kB",
        "proc/self/cgroup": cgroup,
    }
    for folder, contents in groups.items():
        files |= {f"groups/{folder}/{name}": content for name, content in contents.items()}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return available_memory_bytes(root / "proc", root / "groups") // MIB


def version_1(limit: int, used: int, unused: int = 0) -> dict[str, object]:
    stat = f"cache 5\ninactive_file 1\ntotal_inactive_file {unused * MIB}"
    return {
        "memory.limit_in_bytes": limit if limit == NO_LIMIT_1 else limit * MIB,
        "memory.usage_in_bytes": used * MIB,
        "memory.stat": stat,
    }


def version_2(limit: int | str, used: int, unused: int = 0) -> dict[str, object]:
    return {
        "memory.max": limit if isinstance(limit, str) else limit * MIB,
        "memory.current": used * MIB,
        "memory.stat": f"anon 7\ninactive_file {unused * MIB}",
    }


def test_a_machine_without_limits_has_what_is_free(tmp_path: Path) -> None:
    assert tree(tmp_path, "0::/system.slice", **{"system.slice": version_2("max", 400)}) == 1000


def test_a_limit_further_up_binds_too(tmp_path: Path) -> None:
    groups = {"a": version_2(300, 100), "a/b": version_2("max", 60)}
    assert tree(tmp_path, "0::/a/b", **groups) == 200


def test_what_of_a_limit_is_taken_by_files_that_nobody_reads_is_free(tmp_path: Path) -> None:
    """A model's bytes are read to be checked and loaded, and stay in the group's account."""
    assert tree(tmp_path, "0::/a", a=version_2(300, 290, 250)) == 260


@pytest.mark.parametrize("path", ["/docker/4711", "/"])
def test_a_container_under_version_1_is_bound_by_its_limit(tmp_path: Path, path: str) -> None:
    """It sees its own group as the root, and under its name the host's path, where nothing is."""
    cgroup = f"9:name=systemd:{path}\n4:memory:{path}\n0::/"
    assert tree(tmp_path, cgroup, memory=version_1(256, 156, 20)) == 120


def test_under_version_1_no_limit_is_a_number_too(tmp_path: Path) -> None:
    groups = {"memory": version_1(NO_LIMIT_1, 9000), "memory/a": version_1(500, 100)}
    assert tree(tmp_path, "4:cpu,memory:/a", **groups) == 400


def test_more_used_than_the_limit_allows_is_nothing_free(tmp_path: Path) -> None:
    assert tree(tmp_path, "0::/a", a=version_2(100, 120)) == 0


def test_what_clients_send_leaves_a_small_board_its_memory_and_takes_no_more_than_a_bound_of_a_large_one() -> None:
    assert room(600 * MIB) == 150 * MIB
    assert room(100 * MIB) == 64 * MIB  # the largest body that is taken at all
    assert room(64_000 * MIB) == ROOM_BYTES
