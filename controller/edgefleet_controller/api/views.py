"""What the API shows: receives rows and engine state, hands on plain JSON values. Reading only, but for the mark "signed"."""

from __future__ import annotations

from typing import Any

import msgspec
from edgefleet_shared.assignment import AGENT
from edgefleet_shared.messages import Reported
from sqlmodel import Session

from edgefleet_controller import __version__, model_version, results
from edgefleet_controller.controller import Controller
from edgefleet_controller.manifests import Rollout as RolloutManifest
from edgefleet_controller.results import Standing
from edgefleet_controller.rollout.views import ENDED, GateSpec, Rollout, RolloutSpec, Selector, Wave
from edgefleet_controller.store import catalog, devices, rollouts
from edgefleet_controller.store import jobs as compile_jobs
from edgefleet_controller.store import workers as work
from edgefleet_controller.store.tables import Artifact, CompileJob, Device, RolloutRow

DOUBLE = "two machines show this board's identity: was its card copied? Enrol one of them under a name of its own"


def status(controller: Controller) -> dict[str, Any]:
    """The controller's own state."""
    return {
        "version": __version__,
        "broker_connected": controller.gateway.link.connected.is_set(),
        "broker_restarts": controller.broker.restarts if controller.broker else None,
        "broker_pid": controller.broker.pid if controller.broker else None,
        "sent_bytes": controller.sent_bytes(),
        "blob_bytes": controller.sender.sent_bytes,
        "refused_wants": controller.sender.refused_wants,
        "malformed_messages": controller.gateway.malformed,
        "cache": str(controller.settings.cache_folder),
    }


def rollout_spec(manifest: RolloutManifest) -> RolloutSpec:
    """The engine's spec out of what an operator wrote."""
    spec = manifest.spec
    gate = spec.gate
    return RolloutSpec(
        model=spec.model,
        version=spec.version,
        selector=Selector(
            classes=tuple(spec.selector.classes),
            sites=tuple(spec.selector.sites),
            labels=spec.selector.labels,
            devices=tuple(spec.selector.devices),
        ),
        waves=tuple(
            Wave(name=w.name, per_class=w.per_class, count=w.count, percent=w.percent, devices=tuple(w.devices or ()))
            for w in spec.waves
        ),
        soak_s=spec.soak_s,
        timeout_s=spec.timeout_s,
        reach_window_s=spec.reach_window_s,
        max_in_flight=spec.max_in_flight or 0,
        gate=GateSpec(
            min_sample=gate.min_sample,
            max_failed_share=gate.max_failed_share,
            max_error_rate=gate.max_error_rate,
            max_latency_ratio=gate.max_latency_ratio,
            max_drift=gate.max_drift,
        ),
    )


def rollout(controller: Controller, state: Rollout) -> dict[str, Any]:
    """A rollout with its boards and gates; beside what the engine keeps of a board, what that board itself said last."""
    with controller.database.read() as session:
        states = {row.name: _state(row) for row in devices.list_devices(session)}
    boards = []
    for progress in sorted(state.boards.values(), key=lambda p: (p.wave if p.wave >= 0 else 999, p.device)):
        shown = msgspec.to_builtins(progress)
        boards.append(shown | {"wave": state.wave_name(progress.wave), "touched": bool(progress.tries)})
        boards[-1]["state"] = states.get(progress.device, "")
    gates = [msgspec.to_builtins(gate) | {"wave": state.wave_name(gate.wave)} for gate in state.gates]
    return {
        "name": state.name,
        "model": state.spec.model,
        "version": state.spec.version,
        "phase": state.phase.value,
        "ended": state.phase in ENDED,
        "reason": state.reason,
        "waves": [wave.name for wave in state.waves],
        "boards": boards,
        "gates": gates,
        "created_at": state.created_at,
        "ended_at": state.ended_at,
    }


def _state(row: Device) -> str:
    """The state of the board's life cycle, or that it is away."""
    if not row.online:
        return "offline"
    return msgspec.json.decode(row.reported, type=Reported).state.value if row.reported else ""


def rollout_row(row: RolloutRow) -> dict[str, Any]:
    return row.model_dump(include={"name", "model", "version", "phase", "reason", "created_at", "ended_at"})


def models(controller: Controller, model: str, version: str) -> list[dict[str, Any]]:
    """Model versions with what they were compiled to."""
    if model == AGENT:
        return []  # no model: see agents
    with controller.database.read() as session:
        versions = [v for v in catalog.list_versions(session, model) if not version or v.version == version]
        artifacts = catalog.list_artifacts(session, model, version)
        jobs = compile_jobs.list_jobs(session, model, version, unfinished=True)
        failed = compile_jobs.failures(session, model, version)
        classes = {c.name: msgspec.json.decode(c.spec)["spec"] for c in devices.list_classes(session)}
        out = []
        for row in versions:
            spec = model_version.decode(row.spec.encode())
            mine = [a for a in artifacts if (a.model, a.version) == (row.model, row.version)]
            out.append(
                {
                    "model": row.model,
                    "version": row.version,
                    "digest": row.source_digest,
                    "created_at": row.created_at,
                    "inputs": msgspec.to_builtins(spec.inputs),
                    "outputs": msgspec.to_builtins(spec.outputs),
                    "output_kind": spec.output_kind,
                    "artifacts": [artifact(a, classes) for a in mine],
                    "compiling": [
                        job(controller, session, j) for j in jobs if (j.model, j.version) == (row.model, row.version)
                    ],
                    "failed": [_failed(f) for f in failed if (f.model, f.version) == (row.model, row.version)],
                }
            )
        return out


def _failed(failure: CompileJob) -> dict[str, Any]:
    told = {"class": failure.device_class, "ended_at": failure.ended_at}
    return told | {"error": msgspec.json.decode(failure.error)}


def agents(controller: Controller) -> list[dict[str, Any]]:
    """Versions of the agent with the classes that they are made for."""
    with controller.database.read() as session:
        artifacts = catalog.list_artifacts(session, AGENT)
        classes = {c.name: msgspec.json.decode(c.spec)["spec"] for c in devices.list_classes(session)}
        return [
            {
                "version": row.version,
                "code": row.source_digest,
                "created_at": row.created_at,
                "requires": msgspec.json.decode(row.spec),
                "artifacts": [artifact(a, classes) for a in artifacts if a.version == row.version],
            }
            for row in catalog.list_versions(session, AGENT)
        ]


def artifact(row: Artifact, classes: dict[str, Any]) -> dict[str, Any]:
    spec = classes.get(row.device_class, {})
    return {
        "manifest": row.manifest,
        "manifest_bytes": row.manifest_bytes,
        "class": row.device_class,
        "engine": spec.get("engine", ""),
        "arch": spec.get("arch", ""),
        "state": row.state,
        "size_bytes": row.size_bytes,
        "quality": msgspec.json.decode(row.quality),
        "timings": msgspec.json.decode(row.timings),
    }


def mark_signed(controller: Controller) -> None:
    """Mark the artifacts that the published image repository names by now."""
    with controller.database.write() as session:
        for row in catalog.list_artifacts(session, state="compiled"):
            if controller.repository.released(row.device_class, row.model, row.version) == row.manifest:
                catalog.mark_signed(session, row.manifest)


def job(controller: Controller, session: Session, row: CompileJob) -> dict[str, Any]:
    """A compile job; ``step`` is what it is at, or waits for."""
    shown = row.model_dump(exclude={"error", "lease", "log", "report"})  # a lease is its holder's secret
    step = controller.compiling.leases.waits_for(session, row) or row.step
    return shown | {"step": step, "error": msgspec.json.decode(row.error) if row.error else None}


def jobs(controller: Controller, *, unfinished: bool) -> list[dict[str, Any]]:
    """Compile jobs, the oldest first."""
    with controller.database.read() as session:
        return [job(controller, session, row) for row in compile_jobs.list_jobs(session, unfinished=unfinished)]


def one_job(controller: Controller, name: str) -> dict[str, Any]:
    """A compile job, and which workers failed at it and how."""
    with controller.database.read() as session:
        row = compile_jobs.get_job(session, name)
        failures = [
            {"worker": f.worker, "at": f.at, "error": msgspec.json.decode(f.error)}
            for f in compile_jobs.failures_of(session, name)
        ]
        return job(controller, session, row) | {"failures": failures}


def workers(controller: Controller) -> list[dict[str, Any]]:
    """Machines that compile, and builder boards. ``fits``: whether its version of edgefleet may do what it is for; one that never asked does not say."""
    with controller.database.read() as session:
        return [
            row.model_dump(exclude={"certificate_serial", "renewed_serial"})
            | {"fits": bool(row.device_class) or not row.last_seen or row.edgefleet == __version__}
            for row in work.list_workers(session)
        ]


def boards(controller: Controller) -> list[dict[str, Any]]:
    controller.intake.flush()
    with controller.database.read() as session:
        return [_board(row, controller.intake.is_double(row.name)) for row in devices.list_devices(session)]


def board(controller: Controller, name: str) -> dict[str, Any]:
    """One board with its last report and figures in full."""
    controller.intake.flush()
    with controller.database.read() as session:
        row = devices.get_device(session, name)
        held = rollouts.holders(session).get(name, "")
        shown = _board(row, controller.intake.is_double(name))
        last = controller.intake.last(name)
        return shown | {
            "certificate_serial": row.certificate_serial,
            "enrolled_at": row.enrolled_at,
            "rollout": held,
            "report": msgspec.json.decode(row.reported) if row.reported else None,
            "health": msgspec.to_builtins(last) if last else None,
        }


def _board(row: Device, double: bool) -> dict[str, Any]:
    reported = msgspec.json.decode(row.reported, type=Reported) if row.reported else None
    active = reported.active if reported else None
    ended = reported.ended if reported else None
    return {
        "name": row.name,
        "class": row.device_class,
        "site": row.site,
        "labels": msgspec.json.decode(row.labels),
        "online": row.online,
        "revoked": row.revoked,
        "last_seen": row.last_seen,
        "state": reported.state.value if reported else "",
        "model": active.model if active else "",
        "version": active.version if active else "",
        "outcome": ended.outcome.value if ended else "",
        "reason": ended.reason if ended else "",
        "refusal": reported.refusal if reported else "",
        "problem": DOUBLE if double else reported.problem if reported else "",
        "agent": reported.agent_version if reported else "",
        **_word("", row.proof, row.must_sign),
        **_word("agent_", row.agent_proof, row.agent_must_sign),
        "events_dropped": reported.events_dropped if reported else {},
    }


def _word(of: str, proof: str, must_sign: bool) -> dict[str, Any]:
    """Whose word a board's result is; ``of`` begins the names where it is its agent's."""
    known = results.stored(proof)
    refused = known.why if known.standing is Standing.REFUSED else ""
    return {f"{of}result": known.standing.value, f"{of}result_refused": refused, f"{of}must_sign": must_sign}
