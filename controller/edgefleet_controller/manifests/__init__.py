"""Stage 1, source: what operators write, as validated values. Reading them from files is :mod:`edgefleet_controller.manifests.files`.

A file holds one or several documents of the form ``apiVersion, kind, metadata, spec``. Kinds: :class:`DeviceClass` (what
to compile for), :class:`Model` (one version of one network, with its pictures), :class:`Rollout` (who gets it, in which
waves, held by which gate), :class:`Site`. Unknown fields are errors, numbers are not strings, and nothing is guessed.
The published JSON schemas (``docs/generated/schemas``) come from :func:`json_schemas`. Times in s or ms, memory in bytes.
"""

from __future__ import annotations

from typing import Any

from edgefleet_controller.manifests.base import API_VERSION, ManifestBase
from edgefleet_controller.manifests.device_class import Accuracy, DeviceClass, DeviceClassSpec
from edgefleet_controller.manifests.model import (
    Holdout,
    Model,
    ModelAcceptance,
    Output,
    PictureInput,
    Pictures,
    Priors,
    Pruning,
    Training,
)
from edgefleet_controller.manifests.rollout import Rollout
from edgefleet_controller.manifests.site import Site

__all__ = [
    "API_VERSION",
    "KINDS",
    "Accuracy",
    "DeviceClass",
    "DeviceClassSpec",
    "Holdout",
    "Manifest",
    "ManifestBase",
    "Model",
    "ModelAcceptance",
    "Output",
    "PictureInput",
    "Pictures",
    "Priors",
    "Pruning",
    "Rollout",
    "Site",
    "Training",
    "json_schemas",
]

Manifest = DeviceClass | Model | Rollout | Site
KINDS: dict[str, type[DeviceClass] | type[Model] | type[Rollout] | type[Site]] = {
    "DeviceClass": DeviceClass,
    "Model": Model,
    "Rollout": Rollout,
    "Site": Site,
}


def json_schemas() -> dict[str, dict[str, Any]]:
    """The JSON schema of every kind, by kind."""
    return {
        kind: {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
        for kind, model in KINDS.items()
    }
