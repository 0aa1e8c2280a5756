"""Every write of the agent goes through the port: nothing in its code opens, makes, renames or removes a file by itself."""

from __future__ import annotations

import ast
from pathlib import Path

import edgefleet_agent
import edgefleet_shared
import pytest

# Where the calls themselves are, and the socket files of the runtime, which are no data.
ALLOWED = {
    "edgefleet_shared/files.py": {
        "os.open",
        "os.replace",
        "os.unlink",
        "os.mkdir",
        "os.pwrite",
        "os.fsync",
        "os.fchmod",
    },
    "edgefleet_shared/atomic.py": {"os.open", "os.ftruncate", "os.pwrite"},  # the lock
    "edgefleet_shared/streams.py": {"os.open", "open"},  # /dev/null
    "edgefleet_agent/runtime/engines/probe.py": {"os.open"},  # /dev/null
    "edgefleet_agent/runtime/control_server.py": {".unlink"},
    "edgefleet_agent/runtime/control.py": {"os.open"},  # O_PATH
    "edgefleet_agent/power_profile.py": {".write_text"},  # sysfs, which is the kernel and no disk
    "edgefleet_agent/out_of_memory.py": {".write_text"},  # procfs, as well
    "edgefleet_agent/runtime/shm.py": {"import mmap", "os.ftruncate", "os.open"},  # memory, no file of the board
    "edgefleet_agent/runtime/body_room.py": {"import mmap"},  # memory of no file
    "edgefleet_agent/confinement.py": {"import mmap", "os.open"},  # memory of no file, O_PATH
    "edgefleet_agent/runtime/regions.py": {"os.open"},  # a client's shared memory, which it has made
    "edgefleet_agent/runtime/serving.py": {".touch"},  # pages of shared memory
}
OS_CALLS = {
    "open", "rename", "replace", "renames", "unlink", "remove", "rmdir", "removedirs", "mkdir", "makedirs", "link", "symlink",
    "truncate", "ftruncate", "pwrite", "pwritev", "fsync", "fdatasync", "fchmod", "chmod", "mkfifo", "mknod", "sendfile",
}  # fmt: skip
PATH_METHODS = {
    "write_bytes", "write_text", "unlink", "rename", "mkdir", "rmdir", "touch", "symlink_to", "hardlink_to", "chmod",
}  # fmt: skip
MODULES = {"shutil", "tempfile", "mmap", "sqlite3", "dbm", "shelve"}


def sources() -> list[Path]:
    packages = [Path(package.__path__[0]) for package in (edgefleet_agent, edgefleet_shared)]
    return sorted(path for package in packages for path in package.rglob("*.py"))


def changes(tree: ast.AST) -> set[str]:
    """The calls by which a module changes, or may change, the disk."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {f"import {name}" for name in names if name and name.split(".")[0] in MODULES}
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Attribute(ast.Name("os"), name) if name in OS_CALLS:
                found.add(f"os.{name}")
            case ast.Attribute(ast.Name("files" | "atomic") | ast.Attribute(_, "files" | "_files"), _):
                pass  # the port
            case ast.Attribute(_, name) if name in PATH_METHODS:
                found.add(f".{name}")
            case ast.Name("open") | ast.Attribute(_, "open") if _may_write(node):
                found.add("open")
    return found


def _may_write(call: ast.Call) -> bool:
    modes = [
        argument for argument in (*call.args, *(k.value for k in call.keywords)) if isinstance(argument, ast.Constant)
    ]
    return any(isinstance(mode.value, str) and set(mode.value) & set("wax+") and len(mode.value) <= 3 for mode in modes)


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_a_module_changes_the_disk_only_through_the_port(path: Path) -> None:
    name = "/".join(
        path.parts[path.parts.index("edgefleet_agent" if "edgefleet_agent" in path.parts else "edgefleet_shared") :]
    )
    found = changes(ast.parse(path.read_text()))
    assert found <= ALLOWED.get(name, set()), f"{name} writes by another way"


def test_the_search_finds_what_it_looks_for() -> None:
    planted = "import shutil\nfrom pathlib import Path\nPath('x').write_bytes(b'')\nopen('y', 'wb')\nos.rename('a', 'b')\np.open('ab')"
    assert changes(ast.parse(planted)) == {"import shutil", ".write_bytes", "open", "os.rename"}
