"""The manifest of a site: where boards stand."""

from __future__ import annotations

from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator

from edgefleet_controller.manifests.base import ManifestBase, Strict


class SiteSpec(Strict):
    timezone: str = Field(default="UTC", description="IANA name; maintenance windows are in site time")
    description: str = ""
    connectivity: Literal["online", "intermittent", "offline"] = "online"

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError) as exc:
            raise ValueError(f"{value!r} is no time zone of the IANA database, such as Europe/Berlin") from exc
        return value


class Site(ManifestBase):
    kind: Literal["Site"]
    spec: SiteSpec
