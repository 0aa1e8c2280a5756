"""Stages 6 and 7: the real examiner. Receives questions about hostile bytes, has each answered by a sandboxed child of its own."""

from __future__ import annotations

from pathlib import Path

from edgefleet_shared.contract import AcceptanceReport

from edgefleet_agent import accept, verify


class SandboxedExaminer(verify.SandboxedChild):
    """See :class:`edgefleet_agent.ports.Examiner`."""

    def accept(self, state: Path, manifest: str, threads: int) -> AcceptanceReport:
        """Run the candidate against its contract. Raises EnvironmentProblem when no child can be started."""
        return accept.accept(state, manifest, threads=threads)
