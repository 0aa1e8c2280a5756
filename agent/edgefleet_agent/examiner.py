"""Stages 6 and 7: the real examiner. Receives questions about hostile bytes, has each answered by a sandboxed child of its own."""

from __future__ import annotations

from pathlib import Path

from edgefleet_shared.contract import AcceptanceReport

from edgefleet_agent import accept, build, verify
from edgefleet_agent.ports import BuildOrder, BuildReport


class SandboxedExaminer(verify.SandboxedChild):
    """See :class:`edgefleet_agent.ports.Examiner`."""

    def build(self, state: Path, manifest: str, order: BuildOrder) -> BuildReport:
        """Have the candidate's engine make its plan. Raises EnvironmentProblem when the board could not do its part."""
        return build.build(state, manifest, order)

    def accept(self, state: Path, manifest: str, threads: int) -> AcceptanceReport:
        """Run the candidate against its contract. Raises EnvironmentProblem when no child can be started."""
        return accept.accept(state, manifest, threads=threads)
