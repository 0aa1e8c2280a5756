"""Modules that a lean process carries for somebody else's sake: receives a name, hands on a module that is loaded once it is used.

A library imports at its top what it needs in one case of many; in a process that stays resident that is memory for good.
Python's own :class:`importlib.util.LazyLoader` does not help: the library's ``import`` statement asks the module for its ``__spec__``,
and that loads it (before Python 3.14 at least).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _Deferred(ModuleType):
    """Stands for a module until somebody asks for something in it."""

    _edgefleet_lock: threading.RLock
    _edgefleet_loading = False

    def __getattr__(self, name: str) -> Any:
        # The import system looks for such names on every import of the module or of one below it.
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with self._edgefleet_lock:
            if type(self) is _Deferred:  # no other thread loaded it while this one waited
                if self._edgefleet_loading:  # it asks for something of its own that is not there yet
                    raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
                self._edgefleet_load()
        return getattr(self, name)

    def _edgefleet_load(self) -> None:
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self._edgefleet_loading = True
        try:
            self.__spec__.loader.exec_module(self)
            self.__class__ = ModuleType  # type: ignore[assignment]
        finally:
            del self._edgefleet_loading


def defer(name: str) -> None:
    """Let ``import name`` cost nothing until the module is used. Does nothing when it was imported already.

    Args:
        name: a module written in Python, no package; packages above it are imported, and find it deferred already.

    Raises:
        ModuleNotFoundError: there is none.
    """
    if name in sys.modules:
        return
    spec = _find(name)
    if spec is None:
        raise ModuleNotFoundError(f"no module named {name!r}", name=name)
    module = _Deferred(name)
    module.__spec__, module.__loader__, module.__package__ = spec, spec.loader, spec.parent
    module.__file__ = spec.origin
    module._edgefleet_lock = threading.RLock()
    sys.modules[name] = module
    above, _, own = name.rpartition(".")
    if above:
        setattr(importlib.import_module(above), own, module)


def _find(name: str) -> ModuleSpec | None:
    """As :func:`importlib.util.find_spec`, which imports the packages above: they may use the module at once."""
    above = name.rpartition(".")[0]
    if not above or above in sys.modules:
        return importlib.util.find_spec(name)
    package = _find(above)
    if package is None or package.submodule_search_locations is None:
        return None
    return PathFinder.find_spec(name, package.submodule_search_locations)


def without(name: str) -> None:
    """Let ``import name`` fail in this process, for a library that does without where there is none. Does nothing when it was imported already."""
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]


@contextmanager
def stand_in(name: str, wanted: str) -> Iterator[None]:
    """Let a library that is imported within have a class that it wants only to recognise its objects, and of which this process makes none.

    The library keeps the stand-in, which nothing is an instance of; afterwards the module is imported as ever by whoever wants it.
    Does nothing when the module was imported already.

    Args:
        name: the module.
        wanted: the class in it.
    """
    if name in sys.modules:
        yield
        return
    module = ModuleType(name)
    setattr(module, wanted, type(wanted, (), {}))
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
