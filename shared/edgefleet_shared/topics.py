"""The MQTT topics: built and parsed here, nowhere else. Pure.

:data:`TABLE` is the one list of them; the broker's access rules and ``docs/generated/topics.md`` are made from it. State is
retained and level-triggered: a board that was away reads where it should be, not what it missed.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple

from edgefleet_shared.artifact import hex_of
from edgefleet_shared.errors import InputError

PREFIX = "ef/v1"

# Names become topic levels, file names, certificate names and TUF role names, so the narrowest of their alphabets rules.
_NAME = re.compile(r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")
_METADATA_FILE = re.compile(r"^[a-z0-9][a-z0-9._-]{0,120}\.json$")


class Kind(str, Enum):
    DESIRED = "desired"
    DESIRED_AGENT = "desired-agent"
    REPORTED = "reported"
    EVENTS = "events"
    PRESENCE = "presence"
    WANT = "want"
    ACK = "ack"
    REPO = "repo"
    BLOB = "blob"


class Row(NamedTuple):
    """One topic: its pattern, who publishes, retained or not, quality of service, the message (see ``messages``)."""

    kind: Kind
    pattern: str
    by: str
    retained: bool
    qos: int
    message: str
    what: str

    @property
    def from_device(self) -> bool:
        """Whether the board publishes it and the controller reads it; else the other way round."""
        return self.by.startswith("agent")


TABLE = (
    Row(
        Kind.DESIRED,
        "d/<device>/desired",
        "controller",
        True,
        1,
        "TUF Targets metadata",
        "the signed assignment; empty once nothing is wanted of the board any more",
    ),
    Row(
        Kind.DESIRED_AGENT,
        "d/<device>/desired-agent",
        "controller",
        True,
        1,
        "TUF Targets metadata",
        "the signed assignment about the agent itself",
    ),
    Row(Kind.REPORTED, "d/<device>/reported", "agent", True, 1, "Reported", "slots, state, fingerprint, last outcome"),
    Row(
        Kind.EVENTS,
        "d/<device>/events",
        "agent",
        False,
        1,
        "Event",
        "update progress and health, with a sequence number",
    ),
    Row(Kind.PRESENCE, "d/<device>/presence", "agent, last will", True, 1, "Presence", "online, offline"),
    Row(Kind.WANT, "d/<device>/want", "agent", False, 1, "Want", "which chunks of which digest are missing"),
    Row(Kind.ACK, "d/<device>/ack", "controller", False, 1, "Ack", "highest event sequence that is stored durably"),
    Row(Kind.REPO, "repo/<metadata file>", "controller", True, 1, "TUF metadata", "the image repository"),
    Row(
        Kind.BLOB,
        "blob/<sha256 hex>/<n>",
        "controller or relay",
        False,
        1,
        "raw bytes, or their DEFLATE stream where shorter",
        "chunk n, sent once for all",
    ),
)


class Topic(NamedTuple):
    """A parsed topic. ``device`` for ``d/...``; ``name`` is the metadata file or the digest; ``number`` the chunk."""

    kind: Kind
    device: str = ""
    name: str = ""
    number: int = 0


def check_name(name: str, what: str = "name") -> str:
    """Return ``name`` if it may name a device, class, site, model or rollout.

    Raises:
        InputError: it would not survive as topic level and file name.
    """
    if not _NAME.match(name) or ".." in name:
        raise InputError(
            f"{what} {name[:80]!r} is not usable",
            hint="1 to 63 of a-z, 0-9, '.', '_' and '-', beginning and ending with a letter or digit",
        )
    return name


def of_device(device: str, kind: Kind) -> str:
    """``ef/v1/d/<device>/<kind>``; ``device`` may be ``+`` to subscribe to all."""
    return f"{PREFIX}/d/{device if device == '+' else check_name(device, 'device')}/{kind.value}"


def metadata(file_name: str) -> str:
    """``ef/v1/repo/<file>``."""
    if not _METADATA_FILE.match(file_name):
        raise InputError(f"{file_name[:80]!r} is not a metadata file's name")
    return f"{PREFIX}/repo/{file_name}"


def chunk(digest: str, number: int) -> str:
    """``ef/v1/blob/<hex>/<n>``."""
    return f"{PREFIX}/blob/{hex_of(digest)}/{number}"


def chunks(digest: str) -> str:
    """The filter for every chunk of a digest."""
    return f"{PREFIX}/blob/{hex_of(digest)}/+"


def parse(topic: str) -> Topic | None:
    """What a received topic is, or None when it is none of ours."""
    if not topic.startswith(PREFIX + "/"):
        return None
    match topic[len(PREFIX) + 1 :].split("/"):
        case ["d", device, kind] if _NAME.match(device):
            try:
                return Topic(Kind(kind), device=device)
            except ValueError:
                return None
        case ["repo", name] if _METADATA_FILE.match(name):
            return Topic(Kind.REPO, name=name)
        case ["blob", value, number] if len(value) == 64 and number.isdecimal() and len(number) < 8:
            return Topic(Kind.BLOB, name=f"sha256:{value}", number=int(number))
    return None
