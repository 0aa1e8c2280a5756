"""Broker, link, gateway and blob sender, on a real mosquitto under mutual TLS."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from edgefleet_controller.transport.broker import CONTROLLER, Broker, BrokerFiles
from edgefleet_controller.transport.gateway import Gateway
from edgefleet_controller.transport.sender import BlobSender
from edgefleet_shared import chunks, topics
from edgefleet_shared.artifact import Layout
from edgefleet_shared.clock import SystemClock
from edgefleet_shared.errors import EnvironmentProblem
from edgefleet_shared.fingerprint import Fingerprint
from edgefleet_shared.lifecycle import State
from edgefleet_shared.messages import Ack, Event, Health, Presence, Progress, Reported, Want, encode
from edgefleet_shared.mqtt import Link, Will
from edgefleet_shared.topics import Kind
from support.broker import TestBroker, until


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestBroker]:
    running = TestBroker(tmp_path_factory.mktemp("broker"))
    running.broker.start()
    yield running
    running.broker.stop()


class Received:
    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []

    def __call__(self, topic: str, payload: bytes) -> None:
        self.messages.append((topic, payload))

    def topics(self) -> set[str]:
        return {topic for topic, _ in self.messages}


class Sink:
    def __init__(self) -> None:
        self.stored: list[Event] = []
        self.present: dict[str, bool] = {}

    def reported(self, device: str, message: Reported) -> None:
        raise AssertionError("nothing is reported here")

    def presence(self, device: str, message: Presence) -> None:
        self.present[device] = message.online

    def events(self, events: Sequence[Event]) -> list[tuple[str, Ack]]:
        self.stored.extend(events)
        return [(event.device, Ack(event.boot, event.sequence)) for event in events]


class Listener(Sink):
    def __init__(self) -> None:
        super().__init__()
        self.reports: list[Reported] = []

    def reported(self, device: str, message: Reported) -> None:
        self.reports.append(message)


def test_a_board_can_neither_read_nor_write_below_another_boards_name(broker: TestBroker) -> None:
    heard, seen = Received(), Received()
    victim = Link(broker.endpoint("victim"), "victim", on_message=heard)
    thief = Link(broker.endpoint("thief"), "victim", on_message=seen)  # asks for the other's client id
    control = Link(broker.endpoint(CONTROLLER), CONTROLLER, on_message=Received())
    links = (victim, thief, control)
    for link in links:
        link.start()
    until(lambda: all(link.connected.is_set() for link in links), "all connected")
    victim.subscribe(topics.of_device("victim", Kind.DESIRED))
    thief.subscribe(topics.of_device("victim", Kind.DESIRED), f"{topics.PREFIX}/#")
    thief.publish(topics.of_device("victim", Kind.DESIRED), b"forged", retain=True)
    thief.publish(topics.metadata("timestamp.json"), b"forged", retain=True)
    assert thief.drain(5)
    control.publish(topics.of_device("victim", Kind.DESIRED), b"real", retain=True)
    control.publish(topics.metadata("snapshot.json"), b"real", retain=True)
    until(lambda: bool(heard.messages), "the assignment")
    until(lambda: topics.metadata("snapshot.json") in seen.topics(), "what every board may read")
    assert [payload for _, payload in heard.messages] == [b"real"]
    assert seen.topics() == {topics.metadata("snapshot.json")}
    for link in links:
        link.stop()


def test_a_stranger_without_a_certificate_of_the_fleet_gets_no_connection(broker: TestBroker, tmp_path: Path) -> None:
    stranger = TestBroker(tmp_path)
    own = stranger.endpoint("thief")
    endpoint = type(own)(
        host=own.host, port=broker.port, ca=broker.ca.folder / "ca.pem", certificate=own.certificate, key=own.key
    )
    downs: list[str] = []
    link = Link(endpoint, "thief", on_message=Received(), on_down=downs.append)
    link.start()
    until(lambda: len(downs) >= 2, "two refused attempts")
    assert not link.connected.is_set()
    link.stop()


def test_two_boards_with_one_identity_do_not_wear_the_broker_out(broker: TestBroker, tmp_path: Path) -> None:
    """A card that was copied after its enrolment: each connection ends the other one's."""
    connects: list[str] = []
    twins = [
        Link(broker.endpoint("copied"), "copied", on_message=Received(), on_up=lambda: connects.append("up"))
        for _ in range(2)
    ]
    for twin in twins:
        twin.start()
    until(lambda: len(connects) >= 6, "they push each other off", 60)
    seen, watched_s = len(connects), 20.0
    began = time.monotonic()
    until(lambda: time.monotonic() - began > watched_s, "a while", watched_s + 5)
    for twin in twins:
        twin.stop()
    assert len(connects) - seen <= watched_s / 2  # it was three in a second, for ever


def test_the_last_will_tells_that_a_board_was_cut_off(broker: TestBroker) -> None:
    sink = Sink()
    gateway = Gateway(broker.endpoint(CONTROLLER), sink, lambda device, want: None, lambda: None)
    gateway.start()
    will = Will(topics.of_device("b1", Kind.PRESENCE), encode(Presence(False, "boot")))
    link = Link(broker.endpoint("b1"), "b1", on_message=Received(), will=will)
    link.start()
    link.publish(topics.of_device("b1", Kind.PRESENCE), encode(Presence(True, "boot")), retain=True)
    until(lambda: sink.present.get("b1") is True, "online")
    sock = link._client.socket()
    assert sock is not None
    link._stopping.set()  # so that it does not come back
    sock.shutdown(2)
    until(lambda: sink.present.get("b1") is False, "offline by last will")
    gateway.stop()


def test_events_are_acknowledged_after_they_are_stored_and_liars_and_rubbish_are_dropped(broker: TestBroker) -> None:
    sink, acks = Sink(), Received()
    gateway = Gateway(broker.endpoint(CONTROLLER), sink, lambda device, want: None, lambda: None)
    gateway.start()
    link = Link(broker.endpoint("b2"), "b2", on_message=acks)
    link.start()
    link.subscribe(topics.of_device("b2", Kind.ACK))
    until(lambda: link.connected.is_set() and gateway.link.connected.is_set(), "both connected")
    topic = topics.of_device("b2", Kind.EVENTS)
    for body in (
        b"{",
        b"[" * 50_000,
        encode(Event(device="b2", boot="x", sequence=1, at=0.0, body=Health())).replace(b'"x"', b'"\xff"'),
        encode(Event(device="b9", boot="x", sequence=1, at=0.0, body=Health())),
        encode(Event(device="b2", boot="x", sequence=1, at=0.0, body=Health())),
    ):
        link.publish(topic, body)
    until(lambda: bool(acks.messages), "the acknowledgement")
    assert [(e.device, e.sequence) for e in sink.stored] == [("b2", 1)]
    assert gateway.malformed == 4
    link.stop()
    gateway.stop()


class Board:
    """Wants every chunk of a blob and keeps what comes."""

    def __init__(self, broker: TestBroker, name: str, digest: str, chunks: int, deaf_to: frozenset[int]) -> None:
        self.name, self.digest, self.chunks = name, digest, chunks
        self.have: dict[int, bytes] = {}
        self.duplicates = 0
        self._deaf = set(deaf_to)
        self.lock = threading.Lock()
        self.link = Link(broker.endpoint(name), name, on_message=self._take)
        self.link.start()
        self.link.subscribe(topics.chunks(digest))

    def _take(self, topic: str, payload: bytes) -> None:
        parsed = topics.parse(topic)
        assert parsed is not None
        with self.lock:
            if parsed.number in self._deaf:
                self._deaf.discard(parsed.number)  # lost once
                return
            self.duplicates += parsed.number in self.have
            self.have[parsed.number] = payload

    def want(self) -> None:
        with self.lock:
            missing = [n for n in range(self.chunks) if n not in self.have]
        ranges: list[tuple[int, int]] = [(n, n) for n in missing]
        message = Want(digest=self.digest, chunk_bytes=65536, missing=tuple(ranges))
        self.link.publish(topics.of_device(self.name, Kind.WANT), encode(message))


def test_a_board_of_a_newer_agent_is_heard_though_its_state_has_no_name_here(broker: TestBroker) -> None:
    sink = Listener()
    gateway = Gateway(broker.endpoint(CONTROLLER), sink, lambda device, want: None, lambda: None)
    gateway.start()
    link = Link(broker.endpoint("b2"), "b2", on_message=Received())
    link.start()
    until(lambda: link.connected.is_set() and gateway.link.connected.is_set(), "both connected")
    progress = Event(device="b2", boot="x", sequence=1, at=0.0, body=Progress(assignment="a", state=State.BUILDING))
    report = Reported(
        device="b2", device_class="c", boot="x", at=0.0, state=State.BUILDING, agent_version="9", fingerprint=Fingerprint(arch="x86_64")
    )  # fmt: skip
    for kind, message in ((Kind.EVENTS, progress), (Kind.REPORTED, report)):
        link.publish(topics.of_device("b2", kind), encode(message).replace(b'"building"', b'"dreaming"'))
    until(lambda: sink.stored and sink.reports, "both are heard")
    assert sink.reports[-1].state.value == "dreaming"
    body = sink.stored[0].body
    assert isinstance(body, Progress)
    assert body.state.value == "dreaming"
    assert b'"state":"dreaming"' in encode(sink.reports[-1])
    assert gateway.malformed == 0
    link.stop()
    gateway.stop()


def test_many_boards_cost_the_sender_one_copy_and_only_gaps_are_sent_again(broker: TestBroker, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    blob = layout.put(os.urandom(65536 * 20 + 17))
    secret = layout.put(b"not for boards")
    gateway = Gateway(broker.endpoint(CONTROLLER), Sink(), lambda d, w: sender.want(d, w), lambda: None)
    sender = BlobSender(
        layout,
        gateway.publish_chunk,
        lambda: gateway.link.backlog,
        lambda device, digest: digest == blob.digest,
        SystemClock(),
        bytes_per_s=50_000_000,
    )
    gateway.start()
    sender.start()
    boards = [Board(broker, f"w{n}", blob.digest, 21, frozenset({3, 7}) if n == 0 else frozenset()) for n in range(5)]
    until(lambda: all(b.link.connected.is_set() for b in boards) and gateway.link.connected.is_set(), "connected")
    for board in boards:
        board.want()
    until(lambda: all(len(b.have) == 21 for b in boards[1:]) and len(boards[0].have) == 19, "first pass")
    assert sender.sent_bytes == blob.size, "five boards, one copy"
    boards[0].want()
    until(lambda: len(boards[0].have) == 21, "the gaps")
    assert sender.sent_chunks == 23
    assert b"".join(boards[0].have[n] for n in range(21)) == layout.path(blob.digest).read_bytes()
    for bad in (
        Want(digest=secret.digest, chunk_bytes=65536, missing=((0, 0),)),
        Want(digest="sha256:../../etc/passwd", chunk_bytes=65536, missing=((0, 0),)),
        Want(digest=blob.digest, chunk_bytes=1, missing=((0, 10**9),)),
    ):
        boards[0].link.publish(topics.of_device("w0", Kind.WANT), encode(bad))
    until(lambda: sender.refused_wants == 3, "bad wants refused")
    assert sender.sent_chunks == 23
    for board in boards:
        board.link.stop()
    sender.stop()
    gateway.stop()


def test_a_killed_broker_is_started_again_and_links_come_back(tmp_path: Path) -> None:
    own = TestBroker(tmp_path)
    own.broker.start()
    heard = Received()
    link = Link(own.endpoint("b1"), "b1", on_message=heard)
    link.start()
    link.subscribe(topics.metadata("timestamp.json"))
    control = Link(own.endpoint(CONTROLLER), CONTROLLER, on_message=Received())
    control.start()
    until(lambda: link.connected.is_set() and control.connected.is_set(), "connected")
    os.kill(own.broker.pid, signal.SIGKILL)
    until(lambda: not control.connected.is_set(), "the cut is noticed")
    control.publish(topics.metadata("timestamp.json"), b"after", retain=True)
    until(lambda: (topics.metadata("timestamp.json"), b"after") in heard.messages, "subscribed again, served again")
    assert own.broker.restarts == 1
    link.stop()
    control.stop()
    own.broker.stop()


def test_a_taken_port_is_named_and_nothing_is_left_running(broker: TestBroker, tmp_path: Path) -> None:
    files = BrokerFiles(
        folder=tmp_path / "b",
        ca=broker.ca.folder / "ca.pem",
        certificate=broker.ca.folder / "server.pem",
        key=broker.ca.folder / "server.key",
    )
    second = Broker(files, "127.0.0.1", broker.port)
    with pytest.raises(EnvironmentProblem, match=str(broker.port)):
        second.start()
    assert second.pid == 0


def test_a_missing_broker_program_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("edgefleet_controller.transport.broker.shutil.which", lambda *a, **k: None)
    from edgefleet_controller.transport.broker import find_mosquitto, install_mosquitto

    with pytest.raises(EnvironmentProblem, match="Debian package mosquitto"):
        find_mosquitto()
    with pytest.raises(EnvironmentProblem, match="no right to install"):
        install_mosquitto()


def test_sparse_weights_are_sent_in_fewer_bytes_and_arrive_whole(broker: TestBroker, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    chance = random.Random(0)
    weights = bytes(chance.randrange(256) if chance.random() < 0.2 else 0 for _ in range(65536 * 3 + 100))
    blob = layout.put(weights)
    gateway = Gateway(broker.endpoint(CONTROLLER), Sink(), lambda d, w: sender.want(d, w), lambda: None)
    sender = BlobSender(
        layout, gateway.publish_chunk, lambda: gateway.link.backlog, lambda *_: True, SystemClock(), bytes_per_s=50_000_000
    )  # fmt: skip
    gateway.start()
    sender.start()
    board = Board(broker, "w0", blob.digest, 4, frozenset())
    until(lambda: board.link.connected.is_set() and gateway.link.connected.is_set(), "connected")
    board.want()
    until(lambda: len(board.have) == 4, "all chunks")
    sizes = [65536, 65536, 65536, 100]
    assert b"".join(chunks.unpack(board.have[n], size) or b"" for n, size in enumerate(sizes)) == weights
    assert sender.sent_bytes == chunks.sent_bytes(layout.path(blob.digest), 65536) < 0.4 * blob.size
    board.link.stop()
    sender.stop()
    gateway.stop()
