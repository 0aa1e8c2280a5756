"""Stage 2, compile: a child's first lines. Receives a module's name or a file's path, and a request's; runs that ``main``.

Python puts this folder first on its path, where :mod:`.statistics` and others would hide what libraries import by those names: the folder
above goes to the path's end instead, and its modules are ``children.<name>``. A target from elsewhere is a file of its own.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
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
