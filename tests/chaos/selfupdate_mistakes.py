"""Planted mistakes in the agent's own update: what launcher or line would do without one of the rules, each to be caught."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from chaos.mistakes import NoFileSync, NoFolderSync, write_in_place
from edgefleet_agent import launcher, slots
from edgefleet_agent.effects import Result
from edgefleet_agent.launcher import Choice, Trial
from edgefleet_agent.reporting import Told
from edgefleet_agent.results import Results
from edgefleet_agent.selfupdate import AgentEffects
from edgefleet_shared import atomic, results
from edgefleet_shared.lifecycle import Event
from support.disk import MemoryDisk

_choose, _swap, _read_trial = launcher.choose, AgentEffects._swap_agent, launcher.read_trial


def counted_in_memory(state: Path, trial: Trial, files: Any) -> bool:
    """The start is not written down at all."""
    return True


def counted_but_not_synced(state: Path, trial: Trial, files: Any) -> bool:
    """The start is written down, and a power cut forgets it."""
    path = launcher.folder(state) / "trial.json"
    fd = files.open(path.with_name(".trial.tmp"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    counted = trial._replace(starts=trial.starts + 1)
    files.pwrite(fd, memoryview(json.dumps(counted._asdict()).encode()), 0)
    files.close(fd)
    files.replace(path.with_name(".trial.tmp"), path)
    return True


def no_alarm(state: Path, package: str = "", **options: Any) -> Choice:
    return _choose(state, package, **options)._replace(alarm_s=0.0)


def whatever_the_package(state: Path, package: str = "", *, files: Any, **options: Any) -> Choice:
    """A version that was taken on another package is started on this one."""
    trial = _read_trial(state, files=files)
    return _choose(state, trial.package if trial else package, files=files, **options)


def bytes_not_looked_at(own: Path, digest: str, files: Any) -> bool:
    path = launcher._path(own, digest)
    return path is not None and files.size_bytes(path) is not None


def flip_before_the_trial_is_on_record(self: AgentEffects, assignment: Any, stop: Any) -> Result:
    files = self._ports.files
    now = slots.read(self._state, files=files)
    if now.candidate is not None and now.candidate.manifest == assignment.manifest:
        slots.write(self._state, now.flipped(), files=files)
        launcher.write_trial(self._myself.home, Trial(assignment.manifest, 120.0, self._myself.package), files=files)
        self._myself.restart()
        return Result(None)
    return _swap(self, assignment, stop)


def collect_at_the_flip(self: AgentEffects, assignment: Any, stop: Any) -> Result:
    """The version before goes as soon as the new one is to be started."""
    done = _swap(self, assignment, stop)
    active = slots.read(self._state, files=self._ports.files).active
    slots.collect_garbage(self._state, slots.Slots(active=active), files=self._ports.files)
    return done


def believed_at_once(self: AgentEffects, assignment: Any, stop: Any) -> Result:
    return Result(Event.HEALTHY)


def alarm_left_set(self: AgentEffects, assignment: Any) -> Result:
    self._myself = self._myself._replace(proven=lambda: None)
    return _commit(self, assignment)


_commit = AgentEffects._commit_agent


def never_flipped_back(self: AgentEffects, failed: str) -> Result:
    """It ends, and is started again."""
    if self._myself.manifest == failed:
        self._myself.restart()
        return Result(None)
    return _return(self, failed)


_return = AgentEffects._return


def unsigned_from_before(self: Results) -> None:
    """What an earlier start could not sign any more is told as it is."""
    now = self._keeper.now
    if now.ended is not None:
        self._report(Told(ended=now.ended, result=now.result))


def signed_before_is_signed_now(self: Results) -> None:
    """What is signed on the disk is told as the last word, be it about the assignment before."""
    result = self._keeper.now.result
    if result is not None:
        self._report(Told(ended=results.decode(results.payload(result.envelope)).ended, result=result))


@dataclass(frozen=True)
class Mistake:
    """A mistake, and the story whose exploration catches it."""

    name: str
    story: str
    plant: Callable[[], Any] | None = None
    make_disk: type[MemoryDisk] = MemoryDisk


def _patched(owner: Any, name: str, replacement: Any) -> Callable[[], Any]:
    return lambda: patch.object(owner, name, replacement)


UPDATE, DIES, CUT_OFF = "update", "update: it dies at its import", "update: it can't reach the broker"

AGENT_MISTAKES = (
    Mistake("agent: no fsync of files", UPDATE, make_disk=NoFileSync),
    Mistake("agent: no fsync of folders", UPDATE, make_disk=NoFolderSync),
    Mistake("agent: in-place write", UPDATE, _patched(atomic, "write", write_in_place)),
    Mistake("agent: starts counted in memory", DIES, _patched(launcher, "_counted", counted_in_memory)),
    Mistake("agent: starts counted, not synced", "update: it takes the whole board down", _patched(launcher, "_counted", counted_but_not_synced)),
    Mistake("agent: no alarm", "update: it hangs", _patched(launcher, "choose", no_alarm)),
    Mistake("agent: alarm left set", UPDATE, _patched(AgentEffects, "_commit_agent", alarm_left_set)),
    Mistake("agent: another package's version started", "another package came", _patched(launcher, "choose", whatever_the_package)),
    Mistake("agent: bytes not looked at", "what runs has rotted", _patched(launcher, "_is_whole", bytes_not_looked_at)),
    Mistake("agent: flip before the trial is on record", UPDATE, _patched(AgentEffects, "_swap_agent", flip_before_the_trial_is_on_record)),
    Mistake("agent: collect at the flip", DIES, _patched(AgentEffects, "_swap_agent", collect_at_the_flip)),
    Mistake("agent: believed at once", CUT_OFF, _patched(AgentEffects, "_stand_trial", believed_at_once)),
    Mistake("agent: never flipped back", CUT_OFF, _patched(AgentEffects, "_return", never_flipped_back)),
    Mistake("agent: unsigned from before is told unsigned", UPDATE, _patched(Results, "begin", unsigned_from_before)),
    Mistake("agent: unsigned from before is not told", DIES, _patched(Results, "begin", signed_before_is_signed_now)),
)  # fmt: skip
