"""Errors that cross a process or the HTTP API are found again by their code, so no two kinds may have one."""

from __future__ import annotations

import importlib
import pkgutil
import signal
from collections import Counter

import edgefleet_controller
from edgefleet_controller.compile.watching import ChildKilled, died
from edgefleet_shared.errors import EdgefleetError, EngineError, QualityError, from_dict


def kinds(base: type[EdgefleetError] = EdgefleetError) -> list[type[EdgefleetError]]:
    return [base, *(kind for below in base.__subclasses__() for kind in kinds(below))]


def test_a_missed_budget_keeps_its_report_on_its_way() -> None:
    missed = QualityError("too large", hint="another budget", report="sha256:1", page="sha256:2")
    again = from_dict(missed.as_dict())
    assert isinstance(again, QualityError)
    assert again.reports == ("sha256:1", "sha256:2")
    assert QualityError("no sample tells").as_dict().keys() == {"code", "message", "hint"}


def kinds_of_all_modules() -> set[type[EdgefleetError]]:
    for module in pkgutil.walk_packages(edgefleet_controller.__path__, "edgefleet_controller."):
        if ".children." not in module.name:  # those are programs of other environments
            importlib.import_module(module.name)
    return {kind for kind in kinds() if "code" in vars(kind)}


def test_each_kind_of_error_is_found_again_by_its_code() -> None:
    """One that can't be would end the thread that hears of it."""
    for kind in kinds_of_all_modules():
        again = from_dict({"code": kind.code, "message": "check: what", "hint": "do"})
        assert type(again) is kind
        assert again.as_dict() == {"code": kind.code, "message": "check: what", "hint": "do"}


def test_how_a_child_ended_survives_its_way() -> None:
    killed = died("tflite measure", signal.SIGKILL, "see the log")
    again = from_dict(killed.as_dict())
    assert isinstance(again, ChildKilled)
    assert again.as_dict() == killed.as_dict()
    assert again.how == killed.how == "SIGKILL, as when this machine runs out of memory"


def test_each_kind_of_error_has_a_code_of_its_own() -> None:
    own = Counter(kind.code for kind in kinds_of_all_modules())
    assert [code for code, count in own.items() if count > 1] == []
    assert type(from_dict({"code": EngineError.code, "message": "it does not load"})) is EngineError
