"""The controller's settings: receive a home folder and the environment, hand on one frozen record. Read once, by app.py.

::

    <home>/controller.yaml    these settings; every field may be overridden by EDGEFLEET_<FIELD> in the environment
    <home>/ca/                the fleet's certificate authority, server and gateway certificates
    <home>/keys/offline/      root, targets and class keys: move them off this machine, the controller never reads them
    <home>/keys/online/       snapshot, timestamp, director
    <home>/repository/        TUF metadata            <home>/artifacts/   OCI layout
    <home>/broker/            mosquitto               <home>/operator.yaml  how the command line reaches the controller
"""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote, urlsplit

import yaml
from edgefleet_shared import atomic
from edgefleet_shared.errors import EnvironmentProblem, ManifestError, NotFoundError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

CACHE_LIMIT_BYTES = 20_000_000_000


class Settings(BaseModel):
    """Every limit has its unit in its name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Path
    listen: str = Field(default="127.0.0.1:8443", description="host:port of the HTTPS API")
    public_url: str = Field(default="https://127.0.0.1:8443", description="how boards and operators reach the API")
    broker: str = Field(default="embedded", description="'embedded', or host:port of an external broker")
    broker_host: str = Field(default="127.0.0.1", description="where the embedded broker listens, and boards find it")
    broker_port: int = Field(default=8883, ge=1, le=65535)
    database_url: str = Field(default="", description="empty: SQLite in the home folder")
    database_password_file: str = ""
    cache: str = Field(default="", description="toolchains and compiled models; empty: ~/.cache/edgefleet")
    cache_limit_bytes: int = Field(
        default=CACHE_LIMIT_BYTES,
        gt=0,
        description="compiled models in there that were not used for a day go, oldest first, above this",
    )
    blob_bytes_per_s: int = Field(default=20_000_000, gt=0)
    max_blob_bytes: int = Field(default=4_000_000_000, gt=0)
    compile_workers: int = Field(
        default=2, ge=0, description="the controller's own; 0 leaves compiling to fleet worker run"
    )
    work_lease_s: float = Field(
        default=60.0, ge=1, description="a worker that is silent for so long loses its job to another"
    )
    trust_unsigned_results: bool = Field(
        default=False,
        description="boards enrolled while this is so may send results without a signature (agents before 0.2), until their first signed one",
    )
    operator_sha256: str = Field(default="", description="of the operator's token")

    @field_validator("listen")
    @classmethod
    def _address(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"{value!r} is not host:port")
        return value

    @field_validator("broker")
    @classmethod
    def _broker(cls, value: str) -> str:
        return value if value == "embedded" else cls._address(value)

    @field_validator("public_url")
    @classmethod
    def _url(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme != "https" or not url.hostname:
            raise ValueError(f"{value!r} is not an https address")
        cls._reached(url.hostname)
        return value.rstrip("/")

    @field_validator("broker_host")
    @classmethod
    def _reached(cls, value: str) -> str:
        try:
            everywhere = ip_address(value).is_unspecified
        except ValueError:
            return value  # a name
        if everywhere:
            raise ValueError(
                f"{value} is where to listen, no address at which a board finds this machine: give its name or address"
            )
        return value

    @property
    def listen_host(self) -> str:
        return self.listen.rpartition(":")[0]

    @property
    def listen_port(self) -> int:
        return int(self.listen.rpartition(":")[2])

    @property
    def broker_address(self) -> tuple[str, int]:
        """Where boards and the gateway find the broker."""
        if self.broker == "embedded":
            return self.broker_host, self.broker_port
        host, _, port = self.broker.rpartition(":")
        return host, int(port)

    @property
    def cache_folder(self) -> Path:
        return Path(self.cache) if self.cache else default_cache()

    @property
    def database(self) -> str:
        """The database's URL, with the password from its file.

        Raises:
            EnvironmentProblem: the file can't be read.
        """
        url = self.database_url or f"sqlite:///{self.home / 'edgefleet.db'}"
        if self.database_password_file:
            try:
                password = Path(self.database_password_file).read_text().strip()
            except (OSError, UnicodeDecodeError) as exc:
                raise EnvironmentProblem(f"can't read the database's password: {exc}") from exc
            parts = urlsplit(url)
            url = url.replace(f"{parts.username}@", f"{parts.username}:{quote(password, safe='')}@", 1)
        return url


def default_home() -> Path:
    return Path(os.environ.get("EDGEFLEET_HOME") or Path.home() / ".local" / "share" / "edgefleet")


def default_cache() -> Path:
    return Path(os.environ.get("EDGEFLEET_CACHE") or Path.home() / ".cache" / "edgefleet")


def read(home: Path) -> Settings:
    """The settings of a home folder, environment over file.

    Raises:
        NotFoundError: no fleet was made there. ManifestError: a wrong field, by name.
    """
    path = home / "controller.yaml"
    try:
        fields = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError as exc:
        raise NotFoundError(f"there is no fleet in {home}", hint="make one with: fleet init") from exc
    except OSError as exc:
        raise EnvironmentProblem(f"can't read {path}: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ManifestError(f"{path} is not YAML: {exc}") from exc
    if not isinstance(fields, dict):
        raise ManifestError(f"{path}: expected settings by name, found {type(fields).__name__}")
    for name in Settings.model_fields:
        value = os.environ.get(f"EDGEFLEET_{name.upper()}")
        if value and name not in ("home", "operator_sha256"):
            fields[name] = value
    try:
        return Settings(**(fields | {"home": home.resolve()}))
    except ValidationError as exc:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
        raise ManifestError(f"{path}: {told}") from exc


def write(settings: Settings) -> None:
    """Keep what differs from the defaults, so that a newer program's defaults hold."""
    fields = settings.model_dump(mode="json", exclude_defaults=True, exclude={"home"})
    atomic.write(settings.home / "controller.yaml", yaml.safe_dump(fields, sort_keys=True).encode(), 0o600)
