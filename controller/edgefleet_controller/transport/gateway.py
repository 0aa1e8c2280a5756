"""Stage 5, transport: the controller's end of MQTT. Receives messages of boards, hands them to the report sink in batches.

The link's callback only puts into the inbox; one thread drains it. A board is who the topic says (the broker enforces that by
certificate); a message that claims another name is dropped and counted. Acknowledgements go out only after the sink has stored
the events durably: a PUBACK is no durability.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from edgefleet_shared import topics
from edgefleet_shared.errors import TransportError
from edgefleet_shared.messages import Ack, Event, Presence, Reported, Want, decode, encode
from edgefleet_shared.mqtt import Endpoint, Link
from edgefleet_shared.topics import Kind

from edgefleet_controller.transport.broker import CONTROLLER

log = logging.getLogger(__name__)

INBOX_LIMIT = 100_000
BATCH = 500


class ReportSink(Protocol):
    """Where the boards' words go (stage 9)."""

    def reported(self, device: str, message: Reported) -> None: ...

    def presence(self, device: str, message: Presence) -> None: ...

    def events(self, events: Sequence[Event]) -> list[tuple[str, Ack]]:
        """Store durably, each (device, boot, sequence) once; returns what may be acknowledged."""
        ...


class Gateway:
    """The controller's connection.

    Args:
        sink: reports and events.
        want: (device, want) to the blob sender.
        on_up: called after each connect, on the draining thread: publish again what must be retained.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        sink: ReportSink,
        want: Callable[[str, Want], None],
        on_up: Callable[[], None],
    ) -> None:
        self._sink, self._want, self._on_up = sink, want, on_up
        self._inbox: queue.Queue[tuple[str, bytes] | None] = queue.Queue(INBOX_LIMIT)
        self.link = Link(
            endpoint,
            CONTROLLER,
            on_message=self._put,
            on_up=lambda: self._put("", b""),
            receive_maximum=1000,
        )
        self.malformed = 0
        self.overflowed = 0
        self._thread = threading.Thread(target=self._drain, name="gateway", daemon=True)

    def start(self) -> None:
        for kind in (Kind.REPORTED, Kind.PRESENCE, Kind.EVENTS, Kind.WANT):
            self.link.subscribe(topics.of_device("+", kind))
        self._thread.start()
        self.link.start()

    def stop(self) -> None:
        self.link.stop()
        self._inbox.put(None)
        self._thread.join(10)

    def publish_desired(self, device: str, assignment: bytes) -> None:
        """The signed assignment, verbatim, retained."""
        self.link.publish(topics.of_device(device, Kind.DESIRED), assignment, retain=True)

    def publish_desired_agent(self, device: str, assignment: bytes) -> None:
        """The signed assignment about the agent itself, verbatim, retained."""
        self.link.publish(topics.of_device(device, Kind.DESIRED_AGENT), assignment, retain=True)

    def publish_metadata(self, files: dict[str, bytes]) -> None:
        """Image repository metadata in the order given, retained."""
        for name, content in files.items():
            self.link.publish(topics.metadata(name), content, retain=True)

    def publish_chunk(self, topic: str, piece: bytes) -> None:
        self.link.publish(topic, piece)

    # -- the draining thread -------------------------------------------------------------------------------------------

    def _put(self, topic: str, payload: bytes) -> None:
        try:
            self._inbox.put_nowait((topic, payload))
        except queue.Full:
            self.overflowed += 1  # events come again, unacknowledged; reports are retained at the broker

    def _drain(self) -> None:
        while True:
            first = self._inbox.get()
            batch = [first]
            while len(batch) < BATCH:
                try:
                    batch.append(self._inbox.get_nowait())
                except queue.Empty:
                    break
            events: list[Event] = []
            for item in batch:
                if item is None:
                    self._store(events)
                    return
                self._take(*item, events)
            self._store(events)

    def _take(self, topic: str, payload: bytes, events: list[Event]) -> None:
        if not topic:
            self._on_up()
            return
        parsed = topics.parse(topic)
        try:
            match parsed:
                case topics.Topic(Kind.REPORTED, device):
                    message = decode(payload, Reported)
                    if message.device == device:
                        self._sink.reported(device, message)
                        return
                case topics.Topic(Kind.PRESENCE, device):
                    self._sink.presence(device, decode(payload, Presence))
                    return
                case topics.Topic(Kind.EVENTS, device):
                    event = decode(payload, Event)
                    if event.device == device:
                        events.append(event)
                        return
                case topics.Topic(Kind.WANT, device):
                    self._want(device, decode(payload, Want))
                    return
                case _:
                    pass
        except TransportError as exc:
            log.warning("malformed message", extra={"topic": topic, "reason": exc.message})
        self.malformed += 1

    def _store(self, events: list[Event]) -> None:
        if not events:
            return
        for device, ack in self._sink.events(events):
            self.link.publish(topics.of_device(device, Kind.ACK), encode(ack))
