"""Errors that cross a process or the HTTP API are found again by their code, so no two kinds may have one."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter

import edgefleet_controller
from edgefleet_shared.errors import EdgefleetError, EngineError, from_dict


def kinds(base: type[EdgefleetError] = EdgefleetError) -> list[type[EdgefleetError]]:
    return [base, *(kind for below in base.__subclasses__() for kind in kinds(below))]


def test_each_kind_of_error_has_a_code_of_its_own() -> None:
    for module in pkgutil.walk_packages(edgefleet_controller.__path__, "edgefleet_controller."):
        if ".children." not in module.name:  # those are programs of other environments
            importlib.import_module(module.name)
    own = Counter(kind.code for kind in set(kinds()) if "code" in vars(kind))
    assert [code for code, count in own.items() if count > 1] == []
    assert type(from_dict({"code": EngineError.code, "message": "it does not load"})) is EngineError
