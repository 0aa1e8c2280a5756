"""Debian for Arm without an Arm: a tree made by mmdebstrap, its programs run by qemu-user, and the agent's wheels from the project's locks.

The tree is unpacked, never booted, and kept in the cache under a key of everything that is in it. Programs run in it by a binfmt_misc of
their own, in a user namespace (kernel 6.7 or newer): nothing of the host is registered, mounted or left behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("EDGEFLEET_CACHE", Path.home() / ".cache" / "edgefleet")) / "userlands"
SUITE, PYTHON = "bookworm", "3.11"  # the newest Python that tflite-runtime has wheels for
MAKE_LIMIT_S, RUN_LIMIT_S = 600.0, 300.0
OWN = ("edgefleet-shared", "edgefleet-agent")


class Architecture(NamedTuple):
    """Debian's name of it, the kernel's, qemu's, and how its programs begin (ELF class and machine)."""

    debian: str
    machine: str
    qemu: str
    elf_class: int
    elf_machine: int
    glibc: int  # of wheels: 2.x, as the suite has it
    libraries: str
    packages: tuple[str, ...]  # beside Python
    from_debian: frozenset[str]  # distributions that have no wheel for it on the package index
    from_source: frozenset[str] = frozenset()  # nor are they in Debian: compiled here, by gcc for that architecture


ARM64 = Architecture(
    "arm64", "aarch64", "qemu-aarch64-static", 2, 0xB7, 36, "aarch64-linux-gnu", ("libstdc++6", "libgomp1"), frozenset()
)
ARMHF = Architecture(
    "armhf", "armv7l", "qemu-arm-static", 1, 0x28, 36, "arm-linux-gnueabihf",
    ("libstdc++6", "libpython3-dev", "python3-numpy", "python3-psutil", "python3-cffi-backend", "python3-httptools", "python3-uvloop"),
    frozenset({"numpy", "psutil", "cffi", "httptools", "uvloop"}), frozenset({"msgspec"}),
)  # fmt: skip


class UserlandMissing(Exception):
    """No such userland can be had here, and why."""


class Userland:
    """A Debian tree with one set of wheels.

    Args:
        lock: of the wheels; the agent itself is installed from this tree.
        only: these wheels of the lock alone, and no agent.

    Raises:
        UserlandMissing: not here, and why.
    """

    def __init__(self, architecture: Architecture, lock: Path, *, only: frozenset[str] = frozenset()) -> None:
        self.architecture = architecture
        _require("mmdebstrap", architecture.qemu, "unshare", "chroot")
        with _held(CACHE / f".{architecture.debian}.lock"):
            self.tree = _tree(architecture)
            self.site = _site(architecture, self.tree, lock, only)

    def run(self, *command: str, timeout_s: float = RUN_LIMIT_S) -> subprocess.CompletedProcess[str]:
        """Run a command in there, with the wheels on Python's path."""
        return subprocess.run(
            self._entering(*command),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self._environment(),
            check=False,
        )

    @contextmanager
    def started(self, log_file: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command that runs in there for as long as the block lasts; then its namespace, and all that runs in it, is ended."""
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                self._entering(*command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment()
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def _entering(self, *command: str) -> list[str]:
        return [*_NAMESPACES, "sh", "-ceu", _ENTER, "sh", str(self.tree), _format(self.architecture), *command]

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONPATH": f"/{self.site.relative_to(self.tree)}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    @contextmanager
    def folder(self) -> Iterator[tuple[Path, str]]:
        """A folder in there for a test: its path here, and inside."""
        made = Path(tempfile.mkdtemp(dir=self.tree / "srv"))
        try:
            yield made, f"/{made.relative_to(self.tree)}"
        finally:
            shutil.rmtree(made)


_NAMESPACES = ("unshare", "--user", "--map-root-user", "--mount", "--pid", "--kill-child", "--propagation=private")
_ENTER = """
tree=$1 format=$2
shift 2
export PATH=$PATH:/usr/sbin:/sbin
mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
printf %s "$format" > /proc/sys/fs/binfmt_misc/register
mount --rbind /dev "$tree/dev"
mount -t proc proc "$tree/proc" 2>/dev/null || mount --rbind /proc "$tree/proc"
exec chroot "$tree" "$@"
"""


def _format(architecture: Architecture) -> str:
    """The line for binfmt_misc: programs of that ELF class and machine, whatever their type; F opens qemu before the chroot.
    Source: kernel ``Documentation/admin-guide/binfmt-misc.rst``."""
    head = bytes([0x7F, *b"ELF", architecture.elf_class, 1, 1, *bytes(9), 2, 0, architecture.elf_machine, 0])
    mask = bytes([*b"\xff" * 7, *bytes(9), 0xFE, 0xFF, 0xFF, 0xFF])
    told = ["".join(f"\\x{byte:02x}" for byte in part) for part in (head, mask)]
    return f":arm:M::{told[0]}:{told[1]}:{shutil.which(architecture.qemu)}:F"


def _require(*programs: str) -> None:
    if os.geteuid() != 0:
        raise UserlandMissing("making a Debian tree needs root")
    absent = [name for name in programs if shutil.which(name) is None]
    if absent:
        raise UserlandMissing(f"not installed: {', '.join(absent)}; scripts/setup-system arm installs them")
    tried = subprocess.run(
        [*_NAMESPACES, "mount", "-t", "binfmt_misc", "none", "/proc/sys/fs/binfmt_misc"], capture_output=True, text=True
    )
    if tried.returncode:
        raise UserlandMissing(
            f"no binfmt_misc in a user namespace (kernel 6.7 or newer has it): {tried.stderr.strip()}"
        )


def _tree(architecture: Architecture) -> Path:
    packages = ",".join(("python3", *architecture.packages))
    key = hashlib.sha256(f"{SUITE} {packages} {_LINKS}".encode()).hexdigest()[:12]
    tree = CACHE / f"{architecture.debian}-{SUITE}-{key}"
    if tree.is_dir():
        return tree
    staged = Path(tempfile.mkdtemp(dir=CACHE, prefix=".making-"))
    _run(
        "make a Debian tree",
        ["mmdebstrap", "--mode=root", "--variant=extract", f"--architectures={architecture.debian}",
         f"--include={packages}", SUITE, str(staged / "tree"), *_mirror()],
    )  # fmt: skip
    for name in ("dev", "proc", "srv", "tmp"):
        (staged / "tree" / name).mkdir(exist_ok=True)
    # Unpacked only: what a package's script would have linked is linked here.
    for library in _LINKS:
        folder = staged / "tree/usr/lib" / architecture.libraries
        for found in folder.glob(f"*/{library}"):
            (folder / library).symlink_to(found.relative_to(folder))
    (staged / "tree").rename(tree)
    staged.rmdir()
    return tree


def _mirror() -> list[str]:
    """This machine's own mirror of the suite, where it has one: without the suites for updates, so that the tree repeats. Else
    mmdebstrap knows one."""
    if shutil.which("apt-get") is None:
        return []
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    lines = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines()
    found = [uri for uri, suite, component in map(str.split, lines) if (suite, component) == (SUITE, "main")]
    return [f"deb {found[0]} {SUITE} main"] if found else []


_LINKS = ("libblas.so.3", "liblapack.so.3")  # alternatives, which numpy loads


def _site(architecture: Architecture, tree: Path, lock: Path, only: frozenset[str]) -> Path:
    """The folder of the wheels inside the tree; the agent's own is installed anew each time, as it is here."""
    entries = {name: text for name, text in _entries(lock).items() if not only or name in only}
    index = architecture.from_debian | architecture.from_source
    wanted = "\n".join(text for name, text in entries.items() if name not in index) + "\n"
    key = hashlib.sha256(wanted.encode()).hexdigest()[:12]
    site = tree / "opt" / f"{lock.stem}-{key}"
    if not site.is_dir():
        staged = Path(tempfile.mkdtemp(dir=CACHE, prefix=".wheels-"))
        (staged / "lock.txt").write_text(wanted)
        _pip(
            staged / "site", f"install {lock.name} for {architecture.machine}", "--require-hashes", "--only-binary=:all:",
            "--implementation=cp", f"--python-version={PYTHON}", *_platforms(architecture), f"--requirement={staged / 'lock.txt'}",
        )  # fmt: skip
        for name in sorted(architecture.from_source & entries.keys()):
            (staged / "lock.txt").write_text(entries[name] + "\n")
            _compile(architecture, tree, name, staged)
        site.parent.mkdir(exist_ok=True)
        (staged / "site").rename(site)
        shutil.rmtree(staged)
    if not only:
        for package in ("edgefleet_agent", "edgefleet_shared"):
            for old in site.glob(f"{package}*"):
                shutil.rmtree(old)
        _pip(site, "install the agent", "--no-build-isolation", *(str(ROOT / name) for name in ("shared", "agent")))
    return site


def _platforms(architecture: Architecture) -> list[str]:
    """Every manylinux that the suite's glibc can load, newest first."""
    known = [f"manylinux_2_{minor}_{architecture.machine}" for minor in range(architecture.glibc, 16, -1)]
    known += [f"manylinux2014_{architecture.machine}", f"linux_{architecture.machine}"]
    return [f"--platform={name}" for name in known]


def _entries(lock: Path) -> dict[str, str]:
    """A hashed lock's entries by distribution; where there are several (for other Pythons), all of them."""
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", lock.read_text().strip()):
        name = entry.partition("==")[0]
        found[name] = f"{found[name]}\n{entry}" if name in found else entry
    return found


def _compile(architecture: Architecture, tree: Path, name: str, staged: Path) -> None:
    """Build a distribution's C for the architecture, from its locked source, and install it into ``staged / "site"``.

    The tree's own headers come before those of this Python, whose numbers are of another processor.
    """
    gcc = f"{architecture.libraries}-gcc"
    _require(gcc)
    headers = (f"usr/include/python{PYTHON}", "usr/include")
    environment = {
        "CC": gcc, "LDSHARED": f"{gcc} -shared", "_PYTHON_HOST_PLATFORM": f"linux-{architecture.machine}",
        "CFLAGS": "-O2 -fPIC " + " ".join(f"-I{tree / folder}" for folder in headers),
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{PYTHON.replace('.', '')}-{architecture.libraries}.so",
    }  # fmt: skip
    _run(
        f"compile {name} for {architecture.machine}",
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes",
         f"--no-binary={name}", f"--wheel-dir={staged}", f"--requirement={staged / 'lock.txt'}"],
        **environment,
    )  # fmt: skip
    (wheel,) = staged.glob("*.whl")
    _pip(
        staged / "site",
        f"install {name}",
        "--only-binary=:all:",
        f"--python-version={PYTHON}",
        *_platforms(architecture),
        str(wheel),
    )
    wheel.unlink()


def _pip(site: Path, what: str, *arguments: str) -> None:
    _run(what, [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "--no-deps",
        f"--target={site}", *arguments,
    ])  # fmt: skip


def _run(what: str, command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=MAKE_LIMIT_S, check=False, env=os.environ | environment
    )
    if done.returncode:
        raise UserlandMissing(f"can't {what}: {done.stderr.strip()[-600:]}")


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """One maker at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
