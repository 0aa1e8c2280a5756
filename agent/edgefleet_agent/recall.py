"""Stages 5-8, at a start: receives the state folder, hands on what the disk remembers of a line, mended where it is damaged.

A disk that can't be read is asked again, but not for ever: blocks that are dead would keep the board from everything until somebody came.
"""

from __future__ import annotations

from pathlib import Path

from edgefleet_shared.errors import ArtifactError
from edgefleet_shared.files import FileSystem

from edgefleet_agent import slots
from edgefleet_agent.journal import Keeper
from edgefleet_agent.slots import Slot, SlotStatus

TRIES = 12  # at five seconds a minute: what the disk can't give back in that time is as good as damaged


class Recall:
    """Journal and slots of a line.

    Args:
        keeper: gets the journal.
    """

    def __init__(self, state: Path, keeper: Keeper, files: FileSystem) -> None:
        self._state, self._keeper, self._files = state, keeper, files
        self._tries = 0

    def read(self) -> None:
        """Read both; make the folder of the artifacts.

        Raises:
            EnvironmentProblem: the disk can't be read, or not be mended: ask again.
        """
        self._tries += 1
        given_up, files = self._tries > TRIES, self._files
        self._keeper.load(given_up=given_up)
        try:
            slots.read(self._state, files=files, given_up=given_up)
        except ArtifactError:
            # Admitted again, the same assignment finds its blobs on the disk.
            self._keeper.keep(desired_seen="", ended=None, result=None)
            done = self._keeper.now.committed
            slot = Slot(done.manifest, done.model, done.version, SlotStatus.GOOD) if done else None
            slots.mend(self._state, slot, files=files, given_up=given_up)
        slots.artifacts(self._state, files=files)
