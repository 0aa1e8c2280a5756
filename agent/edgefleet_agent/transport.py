"""Stage 5, transport: the board's end of MQTT. Receives messages, puts them into the one inbox; hands on what the runner publishes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

import msgspec
from edgefleet_shared import threads, topics
from edgefleet_shared.assignment import Subject
from edgefleet_shared.errors import EnvironmentProblem, TransportError
from edgefleet_shared.messages import Ack, AgentReport, Presence, Reported, Want, decode, encode
from edgefleet_shared.mqtt import Endpoint, Link, Will
from edgefleet_shared.topics import Kind

log = logging.getLogger(__name__)

# The inbox is bounded and putting blocks: a slow board slows the broker down instead of filling its memory with chunks.
RECEIVE_MAXIMUM = 8
# Messages that the broker has not taken, beyond which events are left to the spool, which sends them again: two of its windows, and then some.
BACKLOG_LIMIT = 256


class Desired(msgspec.Struct, frozen=True):
    """Inbox: an assignment's bytes, unverified, and what it came as one about."""

    content: bytes
    subject: Subject = Subject.MODEL


class MetadataFile(msgspec.Struct, frozen=True):
    """Inbox: a file of the image repository, unverified."""

    name: str
    content: bytes


class Chunk(msgspec.Struct, frozen=True):
    """Inbox: chunk ``number`` of a blob, unverified."""

    digest: str
    number: int
    piece: bytes


class Acked(msgspec.Struct, frozen=True):
    """Inbox: the controller stored our events."""

    ack: Ack


class Up(msgspec.Struct, frozen=True):
    """Inbox: the connection is there."""


class Down(msgspec.Struct, frozen=True):
    """Inbox: the connection is gone, and why."""

    reason: str


Arrival = Desired | MetadataFile | Chunk | Acked | Up | Down


class Uplink(Protocol):
    """The port: how a board talks to its controller. MQTT is one adapter; a fleet simulation is another."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def came_up(self) -> None:
        """Called after each connect, before anything else is published."""
        ...

    def follow_metadata(self, files: tuple[str, ...]) -> None:
        """Have these files of the image repository arrive, now and whenever they change."""
        ...

    def listen(self, digest: str) -> None:
        """Have chunks of this blob arrive."""
        ...

    def unlisten(self, digest: str) -> None: ...

    def want(self, want: Want) -> None: ...

    def quiet_s(self) -> float:
        """For how long nothing has come of a message that is still under way; infinite when nothing ever did."""
        ...

    def report(self, reported: Reported) -> None: ...

    def event(self, content: bytes) -> None: ...

    def fetch(self, digest: str, size: int, chunk_bytes: int, numbers: list[int]) -> None:
        """Get these chunks another way, in the background; they arrive like the others, as long as somebody listens for the blob."""
        ...


class MqttUplink:
    """The MQTT adapter, with HTTPS ranges as its second way.

    Args:
        put: the inbox; may block.
        api_host, api_port: the controller's HTTPS; an empty host for none.
    """

    def __init__(
        self,
        device: str,
        boot: str,
        endpoint: Endpoint,
        put: Callable[[Arrival], None],
        api_host: str,
        api_port: int,
    ) -> None:
        self._device, self._boot, self._endpoint, self._put = device, boot, endpoint, put
        self._api = (api_host, api_port)
        self._fetching = threading.Lock()
        self._metadata: set[str] = set()
        self._listened: set[str] = set()
        self._reported: Reported | None = None
        self._agent: AgentReport | None = None
        offline = Presence(online=False, boot=boot)
        self._link = Link(
            endpoint,
            device,
            on_message=self._take,
            on_up=lambda: put(Up()),
            on_down=lambda reason: put(Down(reason)),
            will=Will(topics.of_device(device, Kind.PRESENCE), encode(offline)),
            receive_maximum=RECEIVE_MAXIMUM,
        )

    def start(self) -> None:
        self._link.subscribe(
            *(topics.of_device(self._device, kind) for kind in (Kind.DESIRED, Kind.DESIRED_AGENT, Kind.ACK))
        )
        self._publish_presence(online=True)
        self._link.start()

    def stop(self) -> None:
        offline = encode(Presence(online=False, boot=self._boot))
        self._link.stop(farewell=[(topics.of_device(self._device, Kind.PRESENCE), offline, True)])

    def came_up(self) -> None:
        """After each connect: the broker may have published our last will meanwhile."""
        self._publish_presence(online=True)

    def _publish_presence(self, *, online: bool) -> None:
        content = encode(Presence(online=online, boot=self._boot))
        self._link.publish(topics.of_device(self._device, Kind.PRESENCE), content, retain=True)

    def follow_metadata(self, files: tuple[str, ...]) -> None:
        wanted = {topics.metadata(name) for name in files}
        self._link.unsubscribe(*(self._metadata - wanted))
        # In the order given: what is referred to arrives before what refers to it.
        self._link.subscribe(*(t for t in map(topics.metadata, files) if t not in self._metadata))
        self._metadata = wanted

    def listen(self, digest: str) -> None:
        self._listened.add(digest)
        self._link.subscribe(topics.chunks(digest))

    def unlisten(self, digest: str) -> None:
        self._listened.discard(digest)
        self._link.unsubscribe(topics.chunks(digest))

    def want(self, want: Want) -> None:
        if self._link.connected.is_set():  # a want that waits for the line would be stale when it goes out
            self._link.publish(topics.of_device(self._device, Kind.WANT), encode(want))

    def quiet_s(self) -> float:
        return self._link.quiet_s

    def report(self, reported: Reported) -> None:
        self._reported = reported
        if self._link.connected.is_set():  # what is so then is told once the line is there
            told = encode(msgspec.structs.replace(reported, agent=self._agent))
            self._link.publish(topics.of_device(self._device, Kind.REPORTED), told, retain=True)

    def tell_agent(self, agent: AgentReport) -> None:
        """What ``reported`` says of the agent itself, now and from now on."""
        self._agent = agent
        if self._reported is not None:
            self.report(self._reported)

    def event(self, content: bytes) -> None:
        if self.backlog < BACKLOG_LIMIT:
            self._link.publish(topics.of_device(self._device, Kind.EVENTS), content)

    @property
    def backlog(self) -> int:
        """Messages that the broker has not taken yet."""
        return self._link.backlog

    def fetch(self, digest: str, size: int, chunk_bytes: int, numbers: list[int]) -> None:
        host, port = self._api
        if not host or not self._fetching.acquire(blocking=False):
            return

        def run() -> None:
            from edgefleet_agent.fetch_http import fetch_chunks  # an HTTP client is memory that few boards ever need

            try:
                fetch_chunks(
                    self._endpoint, host, port, digest, size, chunk_bytes, numbers,
                    lambda name, number, piece: self._put(Chunk(name, number, piece)),
                    wanted=lambda: digest in self._listened,
                )  # fmt: skip
            except TransportError as exc:
                log.warning("HTTP fallback failed", extra={"digest": digest, "reason": str(exc)})
            finally:
                self._fetching.release()

        try:
            threads.spawn("fetch-http", run)
        except EnvironmentProblem as exc:  # asked again, as where nothing came
            self._fetching.release()
            log.warning("HTTP fallback failed", extra={"digest": digest, "reason": str(exc)})

    def _take(self, topic: str, payload: bytes) -> None:
        match topics.parse(topic):
            case topics.Topic(Kind.DESIRED, self._device):
                self._put(Desired(payload))
            case topics.Topic(Kind.DESIRED_AGENT, self._device):
                self._put(Desired(payload, Subject.AGENT))
            case topics.Topic(Kind.ACK, self._device):
                try:
                    self._put(Acked(decode(payload, Ack)))
                except TransportError as exc:
                    log.warning("malformed message", extra={"topic": topic, "reason": str(exc)})
            case topics.Topic(Kind.REPO, _, name):
                self._put(MetadataFile(name, payload))
            case topics.Topic(Kind.BLOB, _, digest, number):
                self._put(Chunk(digest, number, payload))
            case _:
                log.warning("unexpected topic", extra={"topic": topic})
