"""The device classes that are shipped: every one can be compiled for by a target that exists, with options that it knows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgefleet_controller.compile.port import target_named
from edgefleet_controller.manifests import DeviceClass
from support.networks import device_class
from yaml import safe_load_all

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
SHIPPED: list[Any] = [
    document
    for file in sorted(MANIFESTS.rglob("*.yaml"))
    for document in safe_load_all(file.read_text())
    if document["kind"] == "DeviceClass"
]


@pytest.mark.parametrize("document", SHIPPED, ids=lambda document: document["metadata"]["name"])
def test_a_shipped_class_has_a_target_that_makes_what_it_asks_for_and_says_how_far_it_is_proven(document: Any) -> None:
    made = DeviceClass.model_validate(document)
    target = target_named(made.target)
    assert target.engine == made.spec.engine
    assert made.spec.precision in target.precisions
    target.options(made.spec, SimpleNamespace(options={}))
    assert len(made.spec.proven) > 10


def test_their_names_differ() -> None:
    names = [document["metadata"]["name"] for document in SHIPPED]
    assert len(set(names)) == len(names) > 8
    assert device_class().name not in names
