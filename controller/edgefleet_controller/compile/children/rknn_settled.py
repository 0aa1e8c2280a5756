"""Stage 2, compile: RKNN-Toolkit2, started so that it writes the same file twice. Hands on to :mod:`.rknn`.

The toolkit writes structures whole, padding and fields that nobody set among them, and so what lay in memory before: addresses of this process, mostly.
Without address space randomization and with memory that is zero when it is had these are the same each time, on machines
that are set up alike. Source: personality(2), mallopt(3).
"""

from __future__ import annotations

import ctypes
import os
import sys

ADDR_NO_RANDOMIZE = 0x0040000
_ZEROED = (
    "glibc.malloc.tcache_count=0:glibc.malloc.perturb=255"  # 255: its complement is what new memory is filled with
)


def main() -> None:
    if os.environ.get("GLIBC_TUNABLES") != _ZEROED:  # both take effect when a program starts
        os.environ["GLIBC_TUNABLES"] = _ZEROED
        if ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE) == -1:
            sys.stderr.write(
                "this system lets no process go without address randomization: an .rknn made again will have another digest\n"
            )
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - this very program, by the arguments that it has
    from . import rknn

    rknn.main()
