"""What all kinds of manifests share: their frame, and the types of their fields. Times in s or ms, memory in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

API_VERSION: Literal["edgefleet/v1"] = "edgefleet/v1"

Name = Annotated[
    str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$", description="lower case, digits, '-', '.'")
]
Version = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,62}$")]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Milliseconds = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(gt=0)]


class Strict(BaseModel):
    """Unknown fields are errors, numbers are not strings."""

    # JSON, in which all of it is kept and signed, has no infinity.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Metadata(Strict):
    name: Name
    labels: dict[str, str] = {}


class ManifestBase(Strict):
    """What all kinds share. ``file`` is where it was read from; relative paths inside are relative to that file's folder."""

    apiVersion: Literal["edgefleet/v1"] = API_VERSION  # the name is Kubernetes', on purpose
    metadata: Metadata
    _file: Path | None = PrivateAttr(default=None)

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def file(self) -> Path | None:
        return self._file
