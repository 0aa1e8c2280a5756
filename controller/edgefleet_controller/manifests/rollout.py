"""The manifest of a rollout: who gets a version, in which waves, held by which gate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from edgefleet_controller.manifests.base import Count, ManifestBase, Name, Seconds, Strict, Version


class Selector(Strict):
    """Which boards. Fields narrow each other; within one field any value fits. All empty: every enrolled board."""

    classes: list[Name] = []
    sites: list[Name] = []
    devices: list[Name] = []
    labels: dict[str, str] = {}


class Wave(Strict):
    """How many boards take part in this wave, counted over the whole rollout so far and per device class."""

    name: Name
    per_class: Count | None = Field(default=None, description="boards of each class")
    count: Count | None = Field(default=None, description="boards over all classes")
    percent: Annotated[int, Field(ge=1, le=100)] | None = Field(
        default=None, description="of the boards of each class, rounded up"
    )
    devices: list[Name] | None = Field(default=None, min_length=1, description="these boards")

    @model_validator(mode="after")
    def _one(self) -> Wave:
        if sum(v is not None for v in (self.per_class, self.count, self.percent, self.devices)) != 1:
            raise ValueError("give exactly one of per_class, count, percent, devices")
        return self


class Gate(Strict):
    """When a wave may be followed by the next, judged per device class. Zero measurements never pass."""

    min_sample: Count = Field(default=1, description="boards of the class that must have ended")
    max_failed_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_error_rate: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.01, description="failed requests while soaking"
    )
    max_latency_ratio: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="p95 against the class's baseline"
    )
    max_drift: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="population stability index of what the version sees and says against its golden set; above 0.25 much has moved",
    )


class RolloutSpec(Strict):
    model: Name
    version: Version
    selector: Selector = Selector()
    waves: list[Wave] = Field(
        default=[Wave(name="canary", per_class=1), Wave(name="half", percent=50), Wave(name="all", percent=100)],
        min_length=1,
    )
    soak_s: Seconds = Field(default=60.0, description="how long a board watches a new model before it commits")
    timeout_s: Annotated[float, Field(gt=0)] = Field(default=900.0, description="per board, from assignment to outcome")
    reach_window_s: Annotated[float, Field(gt=0)] = Field(
        default=300.0, description="a board not seen for so long is unreached"
    )
    max_in_flight: Count | None = Field(default=None, description="boards that change at one time")
    gate: Gate = Gate()

    @field_validator("waves")
    @classmethod
    def _distinct(cls, waves: list[Wave]) -> list[Wave]:
        names = [wave.name for wave in waves]
        if len(set(names)) != len(names):
            raise ValueError("two waves have the same name")
        return waves


class Rollout(ManifestBase):
    kind: Literal["Rollout"]
    spec: RolloutSpec
