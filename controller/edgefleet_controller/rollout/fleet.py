"""Stage 4, rollout: the fleet as the engine sees it. Receives the session, hands on one view per board."""

from __future__ import annotations

import msgspec
from edgefleet_shared.assignment import Subject
from edgefleet_shared.errors import TransportError
from edgefleet_shared.messages import AgentReport, Reported, SlotReport, decode
from sqlalchemy import text
from sqlmodel import Session

from edgefleet_controller import results
from edgefleet_controller.results import Proof, Standing
from edgefleet_controller.rollout.ports import FiguresSource
from edgefleet_controller.rollout.views import ArtifactRef, BoardView
from edgefleet_controller.store import rollouts

MAX_REMEMBERED_PROOFS = 20_000

# The assignment in force about what a rollout is about, and whose word its result is; ``{}`` begins the columns about that.
_SELECT = (
    "SELECT d.name, d.device_class, d.site, d.labels, d.online, d.last_seen, d.revoked, d.reported, d.{0}proof, d.{0}must_sign, "
    "a.id, a.manifest, a.payload_digest FROM device d LEFT JOIN assignment a ON a.id = d.{0}assignment"
)
_ROWS = {Subject.MODEL: text(_SELECT.format("")), Subject.AGENT: text(_SELECT.format("agent_"))}


class FleetReader:
    """Reads the whole fleet; remembers parsed reports, of which most are the same as at the last look."""

    def __init__(self, figures: FiguresSource) -> None:
        self._figures = figures
        self._parsed: dict[str, tuple[str, Reported | None]] = {}
        self._proofs: dict[str, Proof] = {}

    def read(
        self, session: Session, subject: Subject = Subject.MODEL, but_not_held_by: str = ""
    ) -> dict[str, BoardView]:
        """Every board that was ever enrolled, by name.

        Args:
            subject: whether its model or its agent is looked at. The engine is told of one alike the other.
            but_not_held_by: this rollout's own hold on boards is left out of ``holder``.
        """
        holders = {d: r for d, r in rollouts.holders(session, subject).items() if r != but_not_held_by}
        fleet = {}
        for (
            name,
            device_class,
            site,
            labels,
            online,
            seen,
            revoked,
            content,
            stored,
            must_sign,
            assignment,
            manifest,
            digest,
        ) in session.connection().execute(_ROWS[subject]):
            whole = self._report(name, content)
            reported = whole.agent if whole is not None and subject is Subject.AGENT else whole
            active = reported.active if reported is not None else None
            ended = reported.ended if reported is not None else None
            proof = self._proof(stored)
            signed, doubt, doubted = proof.standing is Standing.SIGNED, "", ""
            if ended is not None and (proof.standing is Standing.REFUSED or (must_sign and not signed)):
                doubt, doubted, ended = proof.why, ended.assignment, None
            fleet[name] = BoardView(
                device=name,
                device_class=device_class,
                site=site,
                labels=msgspec.json.decode(labels, type=dict[str, str]),
                online=bool(online),
                last_seen=seen,
                revoked=bool(revoked),
                fingerprint=whole.fingerprint if whole is not None else None,
                state=reported.state if reported is not None else None,
                serving=active.manifest if active is not None else "",
                good=_good(reported),
                assignment=assignment or "",
                assigned_manifest=manifest or "",
                settled=reported is not None
                and bool(assignment)
                and (reported.desired_seen == digest or (ended is not None and ended.assignment == assignment)),
                refusal=reported.refusal if reported is not None and reported.desired_seen == digest else "",
                ended=ended,
                signed=signed,
                must_sign=bool(must_sign),
                doubt=doubt,
                doubted=doubted,
                figures=self._figures.of(name),
                holder=holders.get(name, ""),
            )
        return fleet

    def _proof(self, content: str) -> Proof:
        if content not in self._proofs:
            if len(self._proofs) > MAX_REMEMBERED_PROOFS:
                self._proofs.clear()
            self._proofs[content] = results.stored(content)
        return self._proofs[content]

    def _report(self, device: str, content: str) -> Reported | None:
        known = self._parsed.get(device)
        if known is not None and known[0] == content:
            return known[1]
        try:
            parsed = decode(content.encode(), Reported) if content else None
        except TransportError:
            # Written by another version of this program; the board's next report replaces it.
            parsed = None
        self._parsed[device] = (content, parsed)
        return parsed


def _good(reported: Reported | AgentReport | None) -> ArtifactRef | None:
    """What the board would fall back to: its active slot if that is good, else its previous one."""
    if reported is None:
        return None
    for slot in (reported.active, reported.previous):
        if slot is not None and slot.status == "good":
            return _ref(slot)
    return None


def _ref(slot: SlotReport) -> ArtifactRef:
    return ArtifactRef(slot.manifest, slot.model, slot.version)
