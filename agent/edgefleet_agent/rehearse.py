"""Stage 7 for the agent itself: receives a candidate good to the byte, hands on a verdict: it starts, and reads what this board remembers.

The parent's half of the rehearsal, as :mod:`edgefleet_agent.accept` is of a model's acceptance. What only a running agent can show (broker,
metadata, runtime) is left to the trial (:mod:`edgefleet_agent.selfupdate`).
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from edgefleet_shared.artifact import CODE_LAYER
from edgefleet_shared.contract import AcceptanceReport, Verdict
from edgefleet_shared.errors import ArtifactError, NotFoundError
from edgefleet_shared.malformed import MALFORMED

from edgefleet_agent import launcher, sandbox, slots, verify
from edgefleet_agent.ports import BuildOrder, BuildReport
from edgefleet_agent.sandbox import Limits

LIMITS = Limits(memory_bytes=192 * 1024 * 1024, time_s=90.0)


class RehearseRequest(msgspec.Struct, frozen=True):
    """parent -> child: the candidate's zip, the board's state folder."""

    code: str
    state: str


class Rehearsed(msgspec.Struct, frozen=True):
    """child -> parent: it came through, and calls itself that version."""

    version: str


class AgentExaminer(verify.SandboxedChild):
    """The examiner of the agent's own line; see :class:`edgefleet_agent.ports.Examiner`.

    Args:
        home: the board's state folder.
    """

    def __init__(self, home: Path) -> None:
        self._home = home

    def build(self, state: Path, manifest: str, order: BuildOrder) -> BuildReport:
        """Never asked: an agent has no plan."""
        raise AssertionError("nothing is built for an agent")

    def accept(self, state: Path, manifest: str, threads: int) -> AcceptanceReport:
        """Rehearse the candidate. Raises EnvironmentProblem when no child can be started."""
        return rehearse(self._home, manifest)


def rehearse(home: Path, manifest_digest: str) -> AcceptanceReport:
    """Have the candidate read the board's state, in a confined child.

    Raises:
        EnvironmentProblem: no child could be started.
    """
    layout = slots.artifacts(launcher.folder(home))
    try:
        manifest = layout.manifest(manifest_digest)
        expected = layout.agent_config(manifest).version
        code = layout.path(manifest.layer(CODE_LAYER).digest)
    except (ArtifactError, NotFoundError) as exc:
        return AcceptanceReport(verdict=Verdict.FAILED, reason=exc.message)
    request = RehearseRequest(str(code.resolve()), str(home.resolve()))
    ended = sandbox.run("edgefleet_agent.rehearse_child", msgspec.json.encode(request), LIMITS)
    try:
        told = [msgspec.json.decode(line, type=Rehearsed).version for line in ended.reports]
    except MALFORMED as exc:
        return AcceptanceReport(verdict=Verdict.FAILED, reason=f"its rehearsal reported nonsense: {exc}")
    if ended.problem or not told:
        lines = [line.strip() for line in ended.output.splitlines() if line.strip()]
        why = ended.problem or "ended without a word"
        return AcceptanceReport(
            verdict=Verdict.FAILED, reason=f"its rehearsal {why}: {lines[-1][:300] if lines else ''}"
        )
    if told != [expected]:
        return AcceptanceReport(verdict=Verdict.FAILED, reason=f"it calls itself {told[0]}, {expected} was signed")
    return AcceptanceReport(verdict=Verdict.PASSED)
