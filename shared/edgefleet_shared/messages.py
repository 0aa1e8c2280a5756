"""The messages on the wire: typed here, encoded and decoded here, nowhere else. Pure.

JSON as msgspec structs; unknown fields are ignored on reading, so either side may be newer. Signed bytes (assignments, TUF
metadata) are not here: they travel verbatim and are read only after they are verified (:mod:`edgefleet_shared.trust`).
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from edgefleet_shared.contract import AcceptanceReport
from edgefleet_shared.drift import Drift
from edgefleet_shared.errors import TransportError
from edgefleet_shared.fingerprint import Fingerprint
from edgefleet_shared.lifecycle import State
from edgefleet_shared.malformed import MALFORMED
from edgefleet_shared.outcomes import Outcome

MAX_MESSAGE_BYTES = 256 * 1024


class SlotReport(msgspec.Struct, frozen=True, kw_only=True):
    """One slot as the board reports it; ``status`` is good, bad or unknown."""

    manifest: str
    model: str
    version: str
    status: str


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How the board's last assignment ended, and why. ``acceptance`` when it came that far; ``number`` rises with each."""

    assignment: str
    manifest: str
    outcome: Outcome
    reason: str = ""
    at: float = 0.0
    acceptance: AcceptanceReport | None = None
    number: int = 0


class EnvelopeSignature(msgspec.Struct, frozen=True):
    """``sig`` is base64; ``keyid`` a hint and no more."""

    keyid: str
    sig: str


class Envelope(msgspec.Struct, frozen=True, kw_only=True, rename={"payload_type": "payloadType"}):
    """A DSSE envelope; ``payload`` is base64 (:mod:`edgefleet_shared.results`)."""

    payload: str
    payload_type: str
    signatures: tuple[EnvelopeSignature, ...]


class SignedResult(msgspec.Struct, frozen=True, kw_only=True):
    """How an assignment ended, signed with the board's key. ``certificate`` is that key's, PEM."""

    envelope: Envelope
    certificate: str


class AgentReport(msgspec.Struct, frozen=True, kw_only=True):
    """How the agent itself stands: the same words as for the model, signed as they are. ``running`` is the manifest of what runs, empty for the version
    that the board's package brought."""

    running: str = ""
    state: State = State.IDLE
    assignment: str = ""
    active: SlotReport | None = None
    candidate: SlotReport | None = None
    previous: SlotReport | None = None
    ended: Ended | None = None
    result: SignedResult | None = None
    desired_seen: str = ""
    refusal: str = ""
    problem: str = ""


class Reported(msgspec.Struct, frozen=True, kw_only=True):
    """``reported``: where the board is. Retained. ``boot`` changes with each start of the agent; ``at`` is UTC seconds; ``ended`` is told
    once it is signed, with the signature in ``result``;
    ``assignment`` is the one being worked on or last ended; ``desired_seen`` the sha256 digest of the last ``desired``
    message that the agent has come to a decision about; ``refusal`` why that one was refused, if it was; ``problem`` what keeps the
    board from going on (a full or broken disk, say) while that lasts: it tries again by itself. ``events_dropped`` counts, by kind and
    since the enrolment, the events that the board gave up because the line was down for longer than its spool could hold; ``agent`` is the agent's
    own update."""

    device: str
    device_class: str
    boot: str
    at: float
    state: State
    agent_version: str
    fingerprint: Fingerprint
    assignment: str = ""
    active: SlotReport | None = None
    candidate: SlotReport | None = None
    previous: SlotReport | None = None
    ended: Ended | None = None
    result: SignedResult | None = None
    desired_seen: str = ""
    refusal: str = ""
    problem: str = ""
    events_dropped: dict[str, int] = {}
    agent: AgentReport | None = None


class Presence(msgspec.Struct, frozen=True):
    """``presence``: retained; the broker publishes the offline one as last will."""

    online: bool
    boot: str


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """A step of the life cycle. ``done`` and ``total`` are bytes while fetching, steps of ``detail`` while building, else 0."""

    assignment: str
    state: State
    detail: str = ""
    done: int = 0
    total: int = 0


class OutcomeTold(msgspec.Struct, frozen=True, kw_only=True, tag="outcome"):
    """An assignment ended. The same words as in ``reported``, but in the ordered, acknowledged stream."""

    ended: Ended
    result: SignedResult | None = None


class Health(msgspec.Struct, frozen=True, kw_only=True, tag="health"):
    """What the board measures, since the agent's start where it is a count. Latencies in ms, as the runtime saw them over its
    last window; ``cpu_share`` 0 to 1 over all cores; ``celsius``, ``throttled`` and ``watts`` None where there is no sensor.
    ``joules_per_request`` is what the board (or, by ``power_scope``, its processor) used since the last report over the requests
    answered meanwhile, idling included. ``drift`` is how far inputs and answers of what serves have moved from its golden set."""

    model: str = ""
    version: str = ""
    requests: int = 0
    failed: int = 0
    crashes: int = 0
    p50_ms: float | None = None
    p95_ms: float | None = None
    cpu_share: float | None = None
    memory_available_bytes: int | None = None
    disk_free_bytes: int | None = None
    celsius: float | None = None
    throttled: bool | None = None
    watts: float | None = None
    joules_per_request: float | None = None
    power_scope: Literal["board", "package"] | None = None
    drift: Drift | None = None
    runtime_up: bool = False


class Dropped(msgspec.Struct, frozen=True, kw_only=True, tag="dropped"):
    """This many events of this boot, from above what is stored up to ``up_to``, will never come: the agent's spool was full. Or, with
    ``earlier``, of the boot and up to the number that stand there: that start ended before they were on its disk."""

    count: int
    up_to: int
    earlier: tuple[str, int] | None = None


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """A ``desired`` message (by digest of its bytes) that failed a check of the trust path or did not fit the board."""

    desired: str
    check: str
    reason: str


Body = Progress | OutcomeTold | Health | Dropped | Refused


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """``events``: (device, boot, sequence) is unique; the controller counts each once whatever the network repeats."""

    device: str
    boot: str
    sequence: int
    at: float
    body: Body


class Ack(msgspec.Struct, frozen=True):
    """``ack``: every event of ``boot`` up to ``sequence`` is stored durably."""

    boot: str
    sequence: int


class Want(msgspec.Struct, frozen=True, kw_only=True):
    """``want``: the chunks that a board still lacks of a blob, as inclusive ranges. An empty list withdraws the want."""

    digest: str
    chunk_bytes: int
    missing: tuple[tuple[int, int], ...]


M = TypeVar("M")


class EnrolRequest(msgspec.Struct, frozen=True):
    """board -> controller, by HTTPS. ``device`` may be empty: then the token names it. ``request`` is a CSR in PEM."""

    token: str
    device: str
    request: str


class Enrolled(msgspec.Struct, frozen=True, kw_only=True):
    """controller -> board, by HTTPS. Certificates are PEM; ``root`` is the newest TUF root metadata."""

    device: str
    device_class: str
    site: str = ""
    certificate: str
    ca: str
    root: str
    broker_host: str
    broker_port: int
    api_host: str
    api_port: int


class Renewed(msgspec.Struct, frozen=True):
    """controller -> board, by HTTPS: a certificate in PEM for the name and the key of the one that the board showed."""

    certificate: str


def encode(message: msgspec.Struct) -> bytes:
    """A message's bytes."""
    return msgspec.json.encode(message)


def decode(content: bytes, kind: type[M]) -> M:
    """A message of ``kind`` out of received bytes.

    Raises:
        TransportError: too large, not JSON, or not that message.
    """
    if len(content) > MAX_MESSAGE_BYTES:
        raise TransportError(f"a message of {len(content)} bytes is larger than the {MAX_MESSAGE_BYTES} allowed")
    try:
        return msgspec.json.decode(content, type=kind)
    except MALFORMED as exc:
        raise TransportError(f"not a {kind.__name__} message: {exc}") from exc


def ranges(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as inclusive ranges: [0, 1, 2, 5] is ((0, 2), (5, 5))."""
    out: list[tuple[int, int]] = []
    for number in numbers:
        if out and number == out[-1][1] + 1:
            out[-1] = (out[-1][0], number)
        else:
            out.append((number, number))
    return tuple(out)
