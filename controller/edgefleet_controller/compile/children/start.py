"""Stage 2, compile: a child's first lines. Receives a module's name or a file's path, and a request's; runs that ``main``.

Python puts this folder first on its path, where :mod:`.statistics` and others would hide what libraries import by those names: the folder
above goes to the path's end instead, and its modules are ``children.<name>``. A target from elsewhere is a file of its own. A child ends with
whoever started it: nobody would hear what it made, nor hold it to its limits.
"""

from __future__ import annotations

import os
import sys

PR_SET_PDEATHSIG = 1  # prctl(2): the signal that comes when the parent dies


def _end_with(parent: str) -> None:
    import ctypes
    import signal

    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux alone has it
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if str(os.getppid()) != parent:  # it died before this was said
            sys.exit(1)


if __name__ == "__main__":
    _end_with(os.environ.pop("EDGEFLEET_STARTED_BY"))
    del sys.path[0]
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

    import importlib
    import importlib.util

    where = sys.argv[1]
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location("edgefleet_target", where)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(f"children.{where}")
    module.main()
