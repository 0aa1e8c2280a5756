"""Confinement from inside: receives a policy, hands on a process that can compute and little else.

Worker and accepting child call :func:`confine` before they touch a model, so that native code reached through a bad model has no
network, no new processes, no files but those it needs, and no way to reach others. Three layers: rlimits, Landlock
(kernel 5.13+) and a seccomp filter (:mod:`edgefleet_agent.system_calls`). What a kernel lacks is returned, never dropped in silence.
Source: kernel ``Documentation/userspace-api/landlock.rst`` and ``seccomp_filter.rst``.

Not handled here: limits that only a parent can watch (wall time, resident memory): :mod:`edgefleet_agent.sandbox`.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import resource
import signal
import struct
import sys
import threading
import time
from pathlib import Path

import msgspec
from edgefleet_shared.fingerprint import architecture

from edgefleet_agent import system_calls

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_SET_DUMPABLE = 1, 22, 38, 4
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture

# Landlock file rights by ABI: 13 bits in ABI 1, then REFER, TRUNCATE, (network), IOCTL_DEV.
_FS_EXECUTE, _FS_WRITE_FILE, _FS_READ_FILE, _FS_READ_DIR = 1, 2, 4, 8
_FS_TRUNCATE, _FS_IOCTL_DEV = 1 << 14, 1 << 15
_ASKED_BYTES = 4 << 20  # in one piece; a kernel refuses a single one that is larger than all it has, whoever asks
_FS_ON_FILES = _FS_EXECUTE | _FS_WRITE_FILE | _FS_READ_FILE | _FS_TRUNCATE | _FS_IOCTL_DEV
_FS_ALL_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}

# What Python and the engines read: code, the loader's cache, what the machine is. Not /etc, not other processes.
_SYSTEM_READABLE = (
    "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/etc/os-release", "/sys",
    "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys/vm", "/proc/sys/kernel",
    "/dev/urandom", "/dev/random", "/dev/zero",
)  # fmt: skip

_TASKS = "/proc/self/task"  # has a folder for each thread


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What a confined process may still do.

    Args:
        readable: files and folders it may read, beside Python, its libraries and ``/sys``.
        writable: folders or device files it may also write.
        file_bytes: largest file it may write.
        open_files: how many descriptors it may hold.
        cpu_s: CPU seconds after which the kernel kills it; 0 for no limit.
        threads: how many threads it may start. Kernel and table of processes are everybody's, and count as nobody's memory.
    """

    readable: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    file_bytes: int = 0
    open_files: int = 256
    cpu_s: int = 0
    threads: int = 1024


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent's thread ends, whatever it is doing then."""
    parent = os.getppid()
    _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def confine(policy: Policy) -> tuple[str, ...]:
    """Give up every right outside ``policy``, for good. Call while the process has one thread.

    Returns:
        the layers that this kernel does not have, each with its reason; empty when all hold.
    """
    missing = []
    libc = _libc()
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        missing.append(f"no_new_privs: {os.strerror(ctypes.get_errno())}")
    for name, layer in (("rlimits", _limits), ("landlock", _landlock), ("seccomp", _seccomp)):
        try:
            layer(policy)
        except (OSError, ValueError) as exc:  # setrlimit raises ValueError
            missing.append(f"{name}: {exc.strerror if isinstance(exc, OSError) else exc}")
    return tuple(missing)


def limit_address_space(more_bytes: int) -> tuple[str, ...]:
    """Allow ``more_bytes`` of address space beyond what is mapped now: call after the engine's libraries are loaded, because
    some of them reserve gigabytes that they never touch.

    Returns:
        as :func:`confine`: an emulator takes the limit and does not keep it.
    """
    # In 32 bits the address space itself is the smaller limit.
    limit = min(_mapped_bytes()[0] + more_bytes, sys.maxsize)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if resource.getrlimit(resource.RLIMIT_AS)[0] != limit:
        return (f"address space: a limit of {limit} bytes was taken and not kept",)
    return ()


def is_refused_memory(may_hold_bytes: int) -> bool:
    """Whether the board refuses this process memory that it may have: all that is free is promised already (``vm.overcommit_memory`` 2), or a
    limit of the service's is smaller. False where its own limit (:func:`limit_address_space`) is in the way.

    Args:
        may_hold_bytes: what it may hold in all. It is asked for, piece by piece and untouched, and given back.
    """
    asked: list[mmap.mmap] = []
    try:
        mapped_bytes, written_bytes = _mapped_bytes()
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        for _ in range((may_hold_bytes - written_bytes) // _ASKED_BYTES):
            mapped_bytes += _ASKED_BYTES
            if limit != resource.RLIM_INFINITY and mapped_bytes > limit:
                return False
            asked.append(mmap.mmap(-1, _ASKED_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except (OSError, MemoryError):
        return True
    finally:
        for piece in asked:
            piece.close()
    return False


def is_refused_threads(count: int) -> bool:
    """Whether the board refuses this process so many threads, which it may have. They are started, and ended again: an engine that gets only some of
    those that it asks for says no more than that it failed, or waits for the others for ever."""
    held, started, before = threading.Event(), list[threading.Thread](), len(os.listdir(_TASKS))
    try:
        for _ in range(count):
            thread = threading.Thread(target=held.wait)
            thread.start()
            started.append(thread)
    except RuntimeError:
        return True
    finally:
        held.set()
        for thread in started:
            thread.join()
        while len(os.listdir(_TASKS)) > before:  # until then the kernel counts them
            time.sleep(0.001)
    return False


def _mapped_bytes() -> tuple[int, int]:
    """The address space of this process, and how much of it is its own to write (proc(5), ``statm``)."""
    fields = [int(field) for field in Path("/proc/self/statm").read_text().split()]
    return fields[0] * resource.getpagesize(), fields[5] * resource.getpagesize()


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _limits(policy: Policy) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (policy.file_bytes, policy.file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (policy.open_files, policy.open_files))
    # The kernel counts what a user has in all, and root never.
    _, most = resource.getrlimit(resource.RLIMIT_NPROC)
    tasks = _tasks_of_this_user() + policy.threads
    tasks = tasks if most == resource.RLIM_INFINITY else min(tasks, most)
    resource.setrlimit(resource.RLIMIT_NPROC, (tasks, tasks))
    if policy.cpu_s:
        # SIGXCPU at the soft limit, SIGKILL a second later.
        resource.setrlimit(resource.RLIMIT_CPU, (policy.cpu_s, policy.cpu_s + 1))


def _tasks_of_this_user() -> int:
    found = 0
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            if process.name.isdecimal() and process.stat().st_uid == os.getuid():
                found += sum(1 for _ in (process / "task").iterdir())
    return found


def _landlock(policy: Policy) -> None:
    libc = _libc()
    abi = libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if abi < 1:
        raise OSError(ctypes.get_errno(), "this kernel has no Landlock")
    handled = _FS_ALL_BY_ABI[min(abi, 5)]
    attribute = struct.pack("Q", handled)
    if abi >= 4:
        attribute += struct.pack("Q", 0b11)  # no TCP bind, no TCP connect
    if abi >= 6:
        attribute += struct.pack("Q", 0b11)  # no abstract Unix sockets, no signals to processes outside
    ruleset = libc.syscall(_LANDLOCK_CREATE, attribute, len(attribute), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "the ruleset was refused")
    try:
        read = _FS_EXECUTE | _FS_READ_FILE | _FS_READ_DIR
        write = handled & ~_FS_EXECUTE
        allowed = [(path, read) for path in (*_SYSTEM_READABLE, *_code_folders(), *policy.readable)]
        allowed += [(path, write) for path in (*policy.writable, "/dev/null")]
        for path, rights in allowed:
            _allow(libc, ruleset, path, rights & handled)
        if libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) != 0:
            raise OSError(ctypes.get_errno(), "the ruleset could not be applied")
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not on this board: nothing to allow
    try:
        if not os.path.isdir(path):
            rights &= _FS_ON_FILES
        rule = struct.pack("=Qi", rights, fd)
        if libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0) != 0:
            raise OSError(ctypes.get_errno(), f"{path} could not be allowed")
    finally:
        # Of procfs it stays open: a file that the kernel forgets there, to have room for others, comes back as one that no rule is about.
        if not path.startswith("/proc/"):
            os.close(fd)


def _code_folders() -> list[str]:
    folders = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)), *sys.path}
    return [folder for folder in folders if folder and os.path.realpath(folder) != "/"]


# --- seccomp ---------------------------------------------------------------------------------------------------------


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _seccomp(policy: Policy) -> None:
    # Calls are numbered by the program's architecture, whatever the kernel's.
    code = system_calls.program(architecture(platform.machine(), 8 * struct.calcsize("P")), os.getpid())
    program = _Program(len(code) // system_calls.INSTRUCTION_BYTES, code)
    if _libc().prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"the filter was refused: {os.strerror(ctypes.get_errno())}")
