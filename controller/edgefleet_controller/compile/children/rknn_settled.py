"""Stage 2, compile: RKNN-Toolkit2, started so that it writes the same file twice. Hands on to :mod:`.rknn`.

The toolkit writes structures whole, padding and fields that nobody set among them, and so what lay in memory before: addresses of this process, mostly.
Without address space randomization, with memory that is zero when it is had, and with nothing different done before, these are the same each time: the modules
are found compiled, and no folder but the work folder, whose path has one length, is told of. Source: personality(2), mallopt(3).
"""

from __future__ import annotations

import compileall
import ctypes
import os
import sys

ADDR_NO_RANDOMIZE = 0x0040000
_ZEROED = (
    "glibc.malloc.tcache_count=0:glibc.malloc.perturb=255"  # 255: its complement is what new memory is filled with
)
PATH_CHARACTERS = (
    200  # of the work folder: less than a file's name may have, so that one more folder makes up what is missing
)


def main() -> None:
    if os.environ.get("GLIBC_TUNABLES") != _ZEROED:  # both take effect when a program starts
        # Compiling a module leaves other memory than loading it compiled: the first file after an update would differ from all later ones.
        compileall.compile_dir(os.path.dirname(__file__), quiet=2)
        if ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE) == -1:
            sys.stderr.write(
                "this system lets no process go without address randomization: an .rknn made again will have another digest\n"
            )
        *command, request = sys.orig_argv
        _go_far()
        os.environ |= {"GLIBC_TUNABLES": _ZEROED, "HOME": ".", "TMPDIR": "."}
        os.execv(sys.executable, [*command, os.path.relpath(request)])  # noqa: S606 - this very program, in its work folder
    from . import rknn

    rknn.main()


def _go_far() -> None:
    """Into a folder of the work folder whose path is as long wherever temporary files go, unless their own place's is longer still."""
    left = PATH_CHARACTERS - len(os.getcwd()) - 1
    if left > 0:
        os.makedirs("w" * left, exist_ok=True)
        os.chdir("w" * left)
