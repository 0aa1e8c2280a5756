"""What a confined process may ask of the kernel: receives an architecture and the process's pid, hands on a seccomp filter. Pure.

Landlock says which files may be opened; this says what else may not be done, above all to other processes of the same user: they
have the same rights, so only the kind of the call tells a model from the runtime. And to files without opening them, which Landlock
does not handle: their modes, owners, times and attributes; before kernel 6.2 their length too.
Source: seccomp(2), kernel ``Documentation/userspace-api/seccomp_filter.rst`` and ``landlock.rst``; numbers from each ``unistd.h`` and
``arch/arm/tools/syscall.tbl``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

INSTRUCTION_BYTES = 8

# Refused with "permission denied": new connections, other programs, other processes, files' attributes, what would outlive the process,
# the kernel's rarely guarded corners.
_REFUSED: dict[str, dict[str, int]] = {
    "x86_64": {
        "socket": 41, "connect": 42, "accept": 43, "bind": 49, "listen": 50, "socketpair": 53, "accept4": 288,
        "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "setsid": 112, "setpgid": 109, "tkill": 200,
        "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "ptrace": 101, "process_vm_readv": 310,
        "process_vm_writev": 311, "pidfd_send_signal": 424, "pidfd_getfd": 438, "unshare": 272, "setns": 308,
        "setpriority": 141, "sched_setparam": 142, "sched_setscheduler": 144, "sched_setattr": 314, "ioprio_set": 251,
        "truncate": 76, "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "chown": 92, "fchown": 93,
        "lchown": 94, "fchownat": 260, "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280,
        "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "setxattrat": 463, "removexattr": 197,
        "lremovexattr": 198, "fremovexattr": 199, "removexattrat": 466,
        "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240,
        "mount": 165, "umount2": 166, "chroot": 161, "pivot_root": 155, "bpf": 321, "perf_event_open": 298,
        "userfaultfd": 323, "keyctl": 250, "add_key": 248, "request_key": 249, "io_uring_setup": 425,
        "init_module": 175, "finit_module": 313, "reboot": 169,
    },
    "aarch64": {
        "socket": 198, "connect": 203, "accept": 202, "bind": 200, "listen": 201, "socketpair": 199, "accept4": 242,
        "execve": 221, "execveat": 281, "setsid": 157, "setpgid": 154, "tkill": 130,
        "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "ptrace": 117, "process_vm_readv": 270,
        "process_vm_writev": 271, "pidfd_send_signal": 424, "pidfd_getfd": 438, "unshare": 97, "setns": 268,
        "setpriority": 140, "sched_setparam": 118, "sched_setscheduler": 119, "sched_setattr": 274, "ioprio_set": 30,
        "truncate": 45, "fchmod": 52, "fchmodat": 53, "fchmodat2": 452, "fchownat": 54, "fchown": 55, "utimensat": 88,
        "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "setxattrat": 463, "removexattr": 14,
        "lremovexattr": 15, "fremovexattr": 16, "removexattrat": 466,
        "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180,
        "mount": 40, "umount2": 39, "chroot": 51, "pivot_root": 41, "bpf": 280, "perf_event_open": 241,
        "userfaultfd": 282, "keyctl": 219, "add_key": 217, "request_key": 218, "io_uring_setup": 425,
        "init_module": 105, "finit_module": 273, "reboot": 142,
    },
    "armv7l": {
        "socket": 281, "connect": 283, "accept": 285, "bind": 282, "listen": 284, "socketpair": 288, "accept4": 366,
        "fork": 2, "vfork": 190, "execve": 11, "execveat": 387, "setsid": 66, "setpgid": 57, "tkill": 238,
        "rt_sigqueueinfo": 178, "rt_tgsigqueueinfo": 363, "ptrace": 26, "process_vm_readv": 376,
        "process_vm_writev": 377, "pidfd_send_signal": 424, "pidfd_getfd": 438, "unshare": 337, "setns": 375,
        "setpriority": 97, "sched_setparam": 154, "sched_setscheduler": 156, "sched_setattr": 380, "ioprio_set": 314,
        "truncate": 92, "truncate64": 193, "chmod": 15, "fchmod": 94, "fchmodat": 333, "fchmodat2": 452, "chown": 182,
        "fchown": 95, "lchown": 16, "chown32": 212, "fchown32": 207, "lchown32": 198, "fchownat": 325, "utimes": 269,
        "futimesat": 326, "utimensat": 348, "utimensat_time64": 412, "setxattr": 226, "lsetxattr": 227,
        "fsetxattr": 228, "setxattrat": 463, "removexattr": 235, "lremovexattr": 236, "fremovexattr": 237,
        "removexattrat": 466,
        "shmget": 307, "semget": 299, "msgget": 303, "mq_open": 274,
        "mount": 21, "umount2": 52, "chroot": 61, "pivot_root": 218, "bpf": 386, "perf_event_open": 364,
        "userfaultfd": 388, "keyctl": 311, "add_key": 309, "request_key": 310, "io_uring_setup": 425,
        "init_module": 128, "finit_module": 379, "reboot": 88,
    },
}  # fmt: skip
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "armv7l": 0x40000028}
# Their arguments lie in memory, where a filter can't look: libc then falls back to the call before them, whose arguments it can see.
_UNKNOWN = {"clone3": 435, "openat2": 437}
_CLONE = {"x86_64": 56, "aarch64": 220, "armv7l": 120}
_CLONE_THREAD = 0x10000
# Calls that name a process first: this one only. abort() signals its own process. 0 means itself to prlimit and sched_setaffinity, and a whole group to kill.
_KILLS = {"x86_64": (62, 234), "aarch64": (129, 131), "armv7l": (37, 268)}  # kill, tgkill
_ITSELF = {"x86_64": (302, 203), "aarch64": (261, 122), "armv7l": (369, 241)}  # prlimit64, sched_setaffinity
# Calls of which only some are refused: number -> (which argument, its refused values).
# To outlive the parent; to have the kernel signal another process when something comes; to type at the terminal that it was started from.
_PRCTL, _FCNTL, _IOCTL = (0, (1,)), (1, (fcntl.F_SETOWN, fcntl.F_SETSIG, 15)), (1, (0x5412, 0x541C, 0x8901, 0x8902))
_IN_PART: dict[str, dict[int, tuple[int, tuple[int, ...]]]] = {
    "x86_64": {157: _PRCTL, 72: _FCNTL, 16: _IOCTL},
    "aarch64": {167: _PRCTL, 25: _FCNTL, 29: _IOCTL},
    "armv7l": {172: _PRCTL, 55: _FCNTL, 221: _FCNTL, 54: _IOCTL},
}
# open, openat: number -> which argument has the flags. To empty a file that may only be read is no way of reading it; Landlock sees to that
# from kernel 6.2 on.
_OPENS = {"x86_64": {2: 1, 257: 2}, "aarch64": {56: 2}, "armv7l": {5: 1, 322: 2}}

_LOAD, _AND, _JUMP_EQUAL, _JUMP_ABOVE, _JUMP_BITS, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _ARGUMENT_0, _ARGUMENT_BYTES = 0, 4, 16, 8  # offsets in struct seccomp_data (little-endian low words)
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_Code = list[tuple[int, int, int, int]]


def program(machine: str, pid: int) -> bytes:
    """The filter, as struct sock_filter in a row.

    Args:
        machine: x86_64, aarch64 or armv7l.
        pid: of the process that will install it.

    Raises:
        OSError: there is none for such programs.
    """
    if machine not in _AUDIT:
        raise OSError(errno.ENOSYS, f"no filter for {machine} programs")
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EACCES)
    code: _Code = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQUAL, 1, 0, _AUDIT[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NR),
    ]
    if machine == "x86_64":  # the x32 calls are the same calls under other numbers
        code += [(_JUMP_ABOVE, 0, 1, 0x40000000), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    for number in sorted(_REFUSED[machine].values()):
        code += [(_JUMP_EQUAL, 0, 1, number), refuse]
    for number in _UNKNOWN.values():
        code += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    code += _for_call(_CLONE[machine], [_argument(0), (_JUMP_BITS, 0, 1, _CLONE_THREAD), allow, refuse])
    for number in _KILLS[machine]:
        code += _for_call(number, [_argument(0), (_JUMP_EQUAL, 0, 1, pid), allow, refuse])
    itself = [_argument(0), (_JUMP_EQUAL, 1, 0, 0), (_JUMP_EQUAL, 0, 1, pid), allow, refuse]
    for number in _ITSELF[machine]:
        code += _for_call(number, itself)
    for number, (which, values) in _IN_PART[machine].items():
        some: _Code = [_argument(which)]
        for value in values:
            some += [(_JUMP_EQUAL, 0, 1, value), refuse]
        code += _for_call(number, [*some, allow])
    looks, empties = os.O_ACCMODE | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC
    for number, which in _OPENS[machine].items():
        code += _for_call(number, [_argument(which), (_AND, 0, 0, looks), (_JUMP_EQUAL, 0, 1, empties), refuse, allow])
    code.append(allow)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _for_call(number: int, then: _Code) -> _Code:
    """``then``, which ends in a return whatever happens, for this call; others go on behind it."""
    return [(_JUMP_EQUAL, 0, len(then), number), *then]


def _argument(which: int) -> tuple[int, int, int, int]:
    return (_LOAD, 0, 0, _ARGUMENT_0 + _ARGUMENT_BYTES * which)
