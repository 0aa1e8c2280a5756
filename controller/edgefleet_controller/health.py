"""Stage 9, health: receives what boards report, in batches; hands on durable rows, acknowledgements, and figures for gates.

Implements the gateway's report sink. Events are acknowledged only after they are committed; each counts once, whatever the network
repeats. Reports and presence are state, not history: of many from one board between two writes only the last is written.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence

import msgspec
from edgefleet_shared.assignment import Subject
from edgefleet_shared.clock import Clock
from edgefleet_shared.errors import EnvironmentProblem
from edgefleet_shared.messages import Ack, AgentReport, Dropped, Event, Health, Presence, Reported

from edgefleet_controller import results
from edgefleet_controller.results import Holder, ResultVerifier, Standing
from edgefleet_controller.rollout.views import Figures
from edgefleet_controller.store import devices, events
from edgefleet_controller.store.database import Database
from edgefleet_controller.store.devices import PresenceRow, ReportedRow
from edgefleet_controller.twins import Twins

log = logging.getLogger(__name__)


# What a database column holds and a person reads. A board that sends other things is broken or hostile: counted, passed over.
_MAX_COUNT = 2**63 - 1
_BOOT = re.compile(r"[\x21-\x7e]{1,64}")


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a board's health: its last report, and the counts since it began to serve what it serves."""

    boot: str
    sequence: int
    at: float
    last: Health
    requests: int = 0
    failed: int = 0
    crashes: int = 0

    def figures(self) -> Figures:
        return Figures(
            model=self.last.model, version=self.last.version, requests=self.requests, failed=self.failed,
            crashes=self.crashes, p50_ms=self.last.p50_ms, p95_ms=self.last.p95_ms,
            drift=self.last.drift.psi if self.last.drift else None,
        )  # fmt: skip


def _is_news(kept: Kept, event: Event, present: str) -> bool:
    if event.boot == kept.boot:
        return event.sequence > kept.sequence
    # Which start is the present one is known; the board's own clock may have gone back since the one before.
    if present in (event.boot, kept.boot):
        return event.boot == present
    return event.at > kept.at


def follow(kept: Kept | None, event: Event, health: Health, present: str = "") -> Kept | None:
    """The board's figures after one more health event; ``kept`` itself when the event is a repetition or came late.

    Args:
        present: the boot that the board last said it is online with; empty before it did.

    Counts are taken as differences between two reports of one boot about one version. The interval in which the version
    changed belongs to neither, so that the new one is not blamed for the old one's failures.
    """
    if kept is not None and not _is_news(kept, event, present):
        return kept
    requests = failed = crashes = 0
    if kept is not None and (health.model, health.version) == (kept.last.model, kept.last.version):
        requests, failed, crashes = kept.requests, kept.failed, kept.crashes
        if event.boot == kept.boot:
            requests += _difference(health.requests, kept.last.requests)
            failed += _difference(health.failed, kept.last.failed)
            crashes += _difference(health.crashes, kept.last.crashes)
    return Kept(
        boot=event.boot, sequence=event.sequence, at=event.at, last=health, requests=requests, failed=failed, crashes=crashes
    )  # fmt: skip


def _countable(event: Event) -> bool:
    numbers = [event.sequence]
    if isinstance(event.body, Health):
        numbers += [event.body.requests, event.body.failed, event.body.crashes]
    elif isinstance(event.body, Dropped):
        boot, up_to = event.body.earlier or (event.boot, event.body.up_to)
        if not _BOOT.fullmatch(boot):
            return False
        numbers += [event.body.up_to, up_to]
    return all(0 <= number <= _MAX_COUNT for number in numbers)


def _difference(now: int, before: int) -> int:
    # A counter that went down began anew: what it shows has all happened since.
    return now - before if now >= before else now


class Intake:
    """The report sink. Safe to call from several threads.

    Args:
        database: where all goes.
        clock: when boards were heard of is told by the controller's clock, not by theirs.
        verifier: decides whose word a result is.
    """

    def __init__(self, database: Database, clock: Clock, verifier: ResultVerifier) -> None:
        self._database, self._clock, self._verifier = database, clock, verifier
        self._lock = threading.Lock()
        self.unsound = 0
        self._reported: dict[str, tuple[Reported, float]] = {}
        self._presence: dict[str, PresenceRow] = {}
        self._seen: dict[str, float] = {}
        self._twins = Twins()
        with database.read() as session:
            stored = devices.all_figures(session)
            known = devices.list_devices(session)
        self._kept = {name: msgspec.json.decode(content, type=Kept) for name, content in stored.items()}
        self._boot = {row.name: row.boot for row in known if row.boot}
        self._online = {row.name for row in known if row.online}

    # -- the report sink

    def reported(self, device: str, message: Reported) -> None:
        """A board's state. It is retained: one of a board that is offline says nothing about now."""
        if not self._sound(message.boot):
            return
        now = self._clock.now()
        with self._lock:
            self._reported[device] = (message, now)
            if device in self._online:
                self._seen[device] = now

    def presence(self, device: str, message: Presence) -> None:
        """Online or offline. The last will of an earlier session may come after the new session's ``online``: passed over."""
        if not self._sound(message.boot):
            return
        now = self._clock.now()
        with self._lock:
            known = self._boot.get(device, "")
            if not message.online and known and message.boot and message.boot != known:
                return
            if message.online:
                self._twins.online(device, message.boot, now)
                self._online.add(device)
                self._seen[device] = now
                self._boot[device] = message.boot
            else:
                self._online.discard(device)
            self._presence[device] = PresenceRow(device, message.boot, message.online, now)

    def events(self, given: Sequence[Event]) -> list[tuple[str, Ack]]:
        """Store events, and what else is waiting, in transactions of at most ``events.BATCH`` events.

        Returns:
            per board and boot up to where its events are durable. When the database can't take them the list is short or
            empty: boards send again what is not acknowledged.
        """
        acks: dict[tuple[str, str], tuple[str, Ack]] = {}
        given = [event for event in given if self._sound(event.boot) and self._sound_counts(event)]
        for begin in range(0, len(given), events.BATCH):
            try:
                for device, found in self._store(given[begin : begin + events.BATCH]).items():
                    acks.update({(device, ack.boot): (device, ack) for ack in found})
            except EnvironmentProblem as exc:
                log.error("events not stored", extra={"count": len(given) - begin, "reason": str(exc)})
                break
        return list(acks.values())

    # -- for the rollout service

    def flush(self) -> None:
        """Write the reports and presences that wait.

        Raises:
            EnvironmentProblem: the database can't take them; they go on waiting.
        """
        self._store(())

    def of(self, device: str) -> Figures | None:
        """The board's figures since it began to serve what it serves; None before its first health event."""
        kept = self._kept.get(device)
        return kept.figures() if kept is not None else None

    def is_double(self, device: str) -> bool:
        """Whether two machines show the board's identity, as far as this controller has heard since it started."""
        with self._lock:
            return self._twins.are_there(device, self._clock.now())

    def last(self, device: str) -> Health | None:
        """The board's last health event."""
        kept = self._kept.get(device)
        return kept.last if kept is not None else None

    def _sound(self, boot: str) -> bool:
        if _BOOT.fullmatch(boot):
            return True
        self.unsound += 1
        return False

    def _sound_counts(self, event: Event) -> bool:
        countable = _countable(event)
        self.unsound += not countable
        return countable

    def _store(self, batch: Sequence[Event]) -> dict[str, list[Ack]]:
        now = self._clock.now()
        with self._lock:
            reported, presence, seen = self._reported, self._presence, self._seen
            if not (batch or reported or presence or seen):
                return {}
            self._reported, self._presence, self._seen = {}, {}, {}
            kept = dict[str, Kept]()
            for event in batch:
                seen[event.device] = now
                if isinstance(event.body, Health):
                    before = kept.get(event.device) or self._kept.get(event.device)
                    followed = follow(before, event, event.body, self._boot.get(event.device, ""))
                    if followed is not None:
                        kept[event.device] = followed
            try:
                rows = self._rows(reported)
                with self._database.write() as session:
                    acks = events.insert(session, batch, now)
                    devices.put_presence(session, presence.values())
                    devices.put_reported(session, rows)
                    devices.put_seen(session, seen)
                    devices.put_figures(session, {d: msgspec.json.encode(k).decode() for d, k in kept.items()})
            except EnvironmentProblem:
                # The lock is held throughout, so that nothing newer has come meanwhile.
                self._reported, self._presence, self._seen = reported, presence, seen
                raise
            self._kept.update(kept)
        return acks

    def _rows(self, reported: dict[str, tuple[Reported, float]]) -> list[ReportedRow]:
        """Reports as they are stored, each result held against the board's certificate. Before the write lock is taken: a signature
        takes a quarter of a millisecond."""
        if not reported:
            return []
        with self._database.read() as session:
            known = devices.holders(session, reported)
        rows = []
        for device, (message, at) in reported.items():
            if device not in known:
                continue
            enrolled_at, proof, agent_proof = known[device]
            about_model = Holder(device=device, enrolled_at=enrolled_at, proof=results.stored(proof))
            about_agent = msgspec.structs.replace(about_model, subject=Subject.AGENT, proof=results.stored(agent_proof))
            rows.append(
                ReportedRow(
                    device, message.boot, msgspec.json.encode(message).decode(), at,
                    *self._prove(message, about_model), *self._prove(message.agent, about_agent),
                )
            )  # fmt: skip
        return rows

    def _prove(self, told: Reported | AgentReport | None, holder: Holder) -> tuple[str, bool]:
        """The proof of a result as it is stored, and whether it is signed."""
        proof = self._verifier.judge(told, holder)
        if proof.standing is Standing.REFUSED and proof.why != holder.proof.why:
            about = {"device": holder.device, "subject": holder.subject.value}
            log.warning("result refused", extra=about | {"reason": proof.why})
        return msgspec.json.encode(proof).decode(), proof.standing is Standing.SIGNED
