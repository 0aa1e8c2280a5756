"""Stage 5, transport: one MQTT 5 connection. Receives what to publish and to subscribe, hands on messages to a callback.

One thread owns paho's client; every other thread only queues work and wakes it (paho's own loop uses ``select()``, which fails
silently from file descriptor 1024 on, and publishing from two threads is not safe with an external loop). Callbacks run on that
thread and must only put into an inbox. Reconnects by itself with jittered back-off, because a broker takes only some 200 TLS
connects per second. paho is imported here, so import this module where it is used.

Not handled here: durability. A PUBACK is none; outboxes and acknowledgements are the caller's.
"""

from __future__ import annotations

import collections
import math
import os
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from edgefleet_shared import threads
from edgefleet_shared.certificates import mind_clock, validity
from edgefleet_shared.deferred import defer
from edgefleet_shared.errors import EnvironmentProblem, TransportError

defer(
    "urllib.request"
)  # paho imports it for proxies that nobody asked for: 2.6 MB with the HTTP client, mail and archives behind it

import paho.mqtt.client as paho  # noqa: E402
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode  # noqa: E402
from paho.mqtt.packettypes import PacketTypes  # noqa: E402
from paho.mqtt.properties import Properties  # noqa: E402
from paho.mqtt.subscribeoptions import SubscribeOptions  # noqa: E402

SESSION_LIFE_S = 14 * 24 * 3600  # the broker keeps a silent board's session that long
KEEPALIVE_S = 20
CONNECT_TIMEOUT_S = 10.0
BACKOFF_FIRST_S = 0.5
BACKOFF_LAST_S = 60.0
STEADY_S = 10.0  # a connection that ends sooner is as one that never was: two boards with one identity end each other's
ACKNOWLEDGED_S = 300.0  # what the broker has not acknowledged by then was lost, and goes out again
OUTBOX_LIMIT = 20_000
IN_FLIGHT = 64


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where the broker is and who we are: PEM files for mutual TLS."""

    host: str
    port: int
    ca: Path
    certificate: Path
    key: Path

    def tls(self) -> ssl.SSLContext:
        """A context that trusts only the fleet's CA and shows our certificate.

        Raises:
            TransportError: a file is missing or no PEM.
        """
        try:
            _need_files(self.ca)
            context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(self.ca))
        except (OSError, ssl.SSLError) as exc:
            raise TransportError(f"the certificates for {self.host} can't be used: {exc}") from exc
        self.load_certificate(context)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    def load_certificate(self, context: ssl.SSLContext) -> None:
        """Show our certificate as the disk has it now in connections that are made from here on: it may have been renewed. A clock that stands
        before its beginning judges no certificate's times.

        Raises:
            TransportError: a file is missing or no PEM.
        """
        try:
            _need_files(self.certificate, self.key)
            context.load_cert_chain(str(self.certificate), str(self.key))
            begins, _ = validity(self.certificate)
        except (OSError, ssl.SSLError) as exc:
            raise TransportError(f"the certificates for {self.host} can't be used: {exc}") from exc
        except EnvironmentProblem as exc:
            raise TransportError(f"the certificates for {self.host} can't be used: {exc.message}") from exc
        mind_clock(context, begins)


class Will(msgspec.Struct, frozen=True):
    """What the broker publishes, retained, when this connection dies."""

    topic: str
    payload: bytes


class _Client(paho.Client):
    """paho's, which tells the broker how large a packet may be, and then takes whatever comes: up to 256 MB, several times over."""

    largest_bytes = 0
    oversized_bytes = 0  # what the broker began to send all the same
    piece_at = -math.inf  # when a part of a packet came that was not its end, in monotonic seconds

    def _sock_recv(self, bufsize: int) -> bytes:
        if bufsize > self.largest_bytes:
            self.oversized_bytes = bufsize
            raise ConnectionAbortedError(f"a packet of {bufsize} bytes")
        piece = super()._sock_recv(bufsize)
        if 0 < len(piece) < bufsize:
            self.piece_at = time.monotonic()
        return piece


class Link:
    """One connection, kept up.

    Args:
        name: the client id; the broker enforces that it is the certificate's name.
        on_message: (topic, payload). Runs on the link's thread: put and return.
        on_up, on_down: the connection came or went (the reason in words).
        receive_maximum: how many unacknowledged QoS 1 messages the broker may send at once; bounds memory.
        max_packet_bytes: how large one may be; a broker that sends a larger one is hung up on.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        name: str,
        *,
        on_message: Callable[[str, bytes], None],
        on_up: Callable[[], None] = lambda: None,
        on_down: Callable[[str], None] = lambda reason: None,
        will: Will | None = None,
        receive_maximum: int = 16,
        max_packet_bytes: int = 1024 * 1024,
    ) -> None:
        self._endpoint = endpoint
        self._on_message, self._on_up, self._on_down = on_message, on_up, on_down
        self._work: collections.deque[Callable[[], None]] = collections.deque()
        self._filters: dict[str, int] = {}
        self._awaited: dict[int, float] = {}  # messages by number, in order, and since when (monotonic seconds)
        self._asked: dict[int, float] = {}  # the same of subscriptions, which are made anew with each connection
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._stopping = threading.Event()
        self._idle = threading.Event()
        self.connected = threading.Event()
        self._up_at = 0.0
        self._reason = "never connected"
        self.sent_bytes = 0  # payload bytes handed to the broker since the start
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{name}", daemon=True)
        self._connect_properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        self._connect_properties.SessionExpiryInterval = SESSION_LIFE_S
        self._connect_properties.ReceiveMaximum = receive_maximum
        self._connect_properties.MaximumPacketSize = max_packet_bytes
        client = _Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=paho.MQTTv5)
        client.largest_bytes = max_packet_bytes
        self._tls = endpoint.tls()
        client.tls_set_context(self._tls)
        client.max_inflight_messages_set(IN_FLIGHT)
        client.connect_timeout = CONNECT_TIMEOUT_S
        if will is not None:
            client.will_set(will.topic, will.payload, qos=1, retain=True)
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_message = lambda c, u, m: self._on_message(m.topic, bytes(m.payload))
        client.on_publish = self._acknowledged
        client.on_subscribe = self._subscribed
        self._client = client

    def start(self) -> None:
        """Raises EnvironmentProblem: this machine has no room for the link's thread."""
        threads.start(self._thread)

    def stop(self, farewell: Iterable[tuple[str, bytes, bool]] = (), timeout_s: float = 5.0) -> None:
        """Publish last words (topic, payload, retained), wait until they are out, disconnect, end the thread."""
        if self.connected.is_set():
            for topic, payload, retain in farewell:
                self.publish(topic, payload, retain=retain)
            self.drain(timeout_s)
        self._stopping.set()
        self._wake()
        self._thread.join(timeout_s)

    @property
    def backlog(self) -> int:
        """Messages that the broker has not acknowledged yet, queued ones included."""
        return len(self._work) + len(self._awaited)

    @property
    def quiet_s(self) -> float:
        """For how long nothing has come of a message that is still under way; infinite when nothing ever did."""
        return time.monotonic() - self._client.piece_at

    @property
    def reason(self) -> str:
        """Why the connection is down, in words."""
        return self._reason

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or unacknowledged."""
        deadline = time.monotonic() + timeout_s
        while self.backlog and time.monotonic() < deadline:
            self._idle.clear()
            self._wake()
            self._idle.wait(0.05)
        return not self.backlog

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Queue a message. While the connection is down it waits here.

        Raises:
            TransportError: more than OUTBOX_LIMIT messages wait already.
        """
        if len(self._work) >= OUTBOX_LIMIT:
            raise TransportError(f"{len(self._work)} messages wait for the broker already")

        def go() -> None:
            info = self._client.publish(topic, payload, qos=qos, retain=retain)
            self.sent_bytes += len(payload)
            if qos:
                self._awaited[info.mid] = time.monotonic()

        self._work.append(go)
        self._wake()

    def subscribe(self, *filters: str, qos: int = 1) -> None:
        """Subscribe now and after every reconnect. Retained messages come anew each time: level-triggered."""
        for one in filters:
            self._filters[one] = qos
        self._work.append(lambda: self._send_subscribe(filters, qos))
        self._wake()

    def unsubscribe(self, *filters: str) -> None:
        known = [one for one in filters if self._filters.pop(one, None) is not None]
        if known:
            self._work.append(lambda: self._send_unsubscribe(known))
            self._wake()

    # -- on the link's thread ------------------------------------------------------------------------------------------

    def _send_subscribe(self, filters: Iterable[str], qos: int) -> None:
        wanted = [(one, SubscribeOptions(qos=qos)) for one in filters if one in self._filters]
        if wanted and self.connected.is_set():
            _, number = self._client.subscribe(wanted)
            if number is not None:
                self._asked[number] = time.monotonic()

    def _send_unsubscribe(self, filters: list[str]) -> None:
        gone = [one for one in filters if one not in self._filters]
        if gone and self.connected.is_set():
            self._client.unsubscribe(gone)

    def _wake(self) -> None:
        try:
            self._wake_w.send(b"\0")
        except (BlockingIOError, OSError):
            return  # full: it is awake already; closed: it has ended

    def _connected(self, client: Any, userdata: Any, flags: Any, code: Any, properties: Any) -> None:
        if code.is_failure:
            self._reason = f"the broker refused the connection: {code}"
            return
        self._up_at = time.monotonic()
        self._awaited = dict.fromkeys(self._awaited, self._up_at)
        self._asked.clear()
        self.connected.set()
        for qos in sorted(set(self._filters.values())):
            self._send_subscribe([one for one, level in self._filters.items() if level == qos], qos)
        self._on_up()

    def _acknowledged(self, client: Any, userdata: Any, number: int, code: Any, properties: Any) -> None:
        self._awaited.pop(number, None)

    def _subscribed(self, client: Any, userdata: Any, number: int, codes: Any, properties: Any) -> None:
        self._asked.pop(number, None)

    def _disconnected(self, client: Any, userdata: Any, flags: Any, code: Any, properties: Any) -> None:
        if self.connected.is_set():
            oversized, self._client.oversized_bytes = self._client.oversized_bytes, 0
            why = f"the broker sent a packet of {oversized} bytes" if oversized else str(code)
            self._reason = f"the connection was lost: {why}"

    def _run(self) -> None:
        backoff = BACKOFF_FIRST_S
        while not self._stopping.is_set():
            try:
                self._endpoint.load_certificate(self._tls)
                self._client.connect(
                    _address(self._endpoint.host),
                    self._endpoint.port,
                    KEEPALIVE_S,
                    clean_start=False,
                    properties=self._connect_properties,
                )
                self._reason = "the broker closed the connection without an answer; is our certificate valid there?"
                self._serve()
            except TransportError as exc:
                self._reason = str(exc)
            except (OSError, ssl.SSLError, ValueError) as exc:
                self._reason = f"can't reach the broker at {self._endpoint.host}:{self._endpoint.port}: {exc}"
            if self.connected.is_set() and time.monotonic() - self._up_at >= STEADY_S:
                backoff = BACKOFF_FIRST_S
            self.connected.clear()
            if not self._stopping.is_set():
                self._on_down(self._reason)
            # Full jitter: after a power cut a whole hall of boards comes back at once.
            share = int.from_bytes(os.urandom(4), "big") / 2**32  # the random module would stay for this: 300 KB
            self._stopping.wait(share * backoff)
            backoff = min(backoff * 2, BACKOFF_LAST_S)
        self._wake_r.close()
        self._wake_w.close()

    def _is_unheard(self) -> bool:
        """Whether something that was sent was lost on a connection that seems to be well. On a slow line it may wait for minutes behind what goes
        out before it, and its acknowledgement behind what is under way."""
        oldest = min((next(iter(sent.values())) for sent in (self._awaited, self._asked) if sent), default=math.inf)
        late = time.monotonic() - oldest > ACKNOWLEDGED_S
        return late and self.quiet_s > KEEPALIVE_S and not self._client.want_write()

    def _serve(self) -> None:
        """Until the connection is gone: read, write, do queued work."""
        with selectors.DefaultSelector() as selector:
            sock = self._client.socket()
            if sock is None:
                return
            selector.register(self._wake_r, selectors.EVENT_READ)
            events = selectors.EVENT_READ
            selector.register(sock, events)
            begun = time.monotonic()
            while self._client.socket() is sock:
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._client.want_write() else 0)
                if wanted != events:
                    events = wanted
                    selector.modify(sock, events)
                ready = {key.fileobj for key, _ in selector.select(0.0 if _pending(sock) else 0.5)}
                if self._wake_r in ready:
                    try:
                        self._wake_r.recv(4096)
                    except BlockingIOError:
                        continue
                if (sock in ready or _pending(sock)) and self._client.loop_read() != MQTTErrorCode.MQTT_ERR_SUCCESS:
                    break
                if self.connected.is_set():
                    if self._is_unheard():
                        self._reason = "the broker does not acknowledge what it is told"
                        break
                    while self._work and len(self._awaited) < 4 * IN_FLIGHT:
                        self._work.popleft()()
                elif time.monotonic() - begun > CONNECT_TIMEOUT_S:
                    self._reason = "the broker did not answer the connection request"
                    break
                if self._client.want_write() and self._client.loop_write() != MQTTErrorCode.MQTT_ERR_SUCCESS:
                    break
                if self._client.loop_misc() != MQTTErrorCode.MQTT_ERR_SUCCESS:
                    break
                if not self.backlog:
                    self._idle.set()
                if self._stopping.is_set():
                    self._client.disconnect()
                    self._client.loop_write()
                    break
            leftover = self._client.socket()
            if leftover is not None and not self._stopping.is_set():
                leftover.close()


def _need_files(*paths: Path) -> None:
    """Raises OSError: one is a pipe or the like, at which OpenSSL would wait for ever."""
    for path in paths:
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is no file")


def _address(host: str) -> Any:
    """What the socket and ssl modules take as it is. A str they encode as an international name, which takes tables of 430 KB."""
    return host.encode() if host.isascii() else host


def _pending(sock: Any) -> bool:
    return isinstance(sock, ssl.SSLSocket) and sock.fileno() >= 0 and sock.pending() > 0
