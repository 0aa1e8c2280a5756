"""Stage 8, swap: receives the agent's orders, starts and stops workers, and changes which version the switchboard lets serve.

Blue-green: the new version's worker is loaded and warm before one pointer moves; the old one stays as *standby* until it is
retired, and answers at once when the new one's worker dies. In-place, for boards that can't hold both: requests are parked
while the old worker stops and the new one starts; when the new one fails, the old one is started again.
Not handled here: requests (:mod:`switchboard`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from functools import partial
from typing import Literal

from edgefleet_shared.artifact import MODEL_LAYER, Layout, Manifest, ModelConfig
from edgefleet_shared.errors import ConflictError, EdgefleetError, NotFoundError

from edgefleet_agent.runtime import swap_mode, turns
from edgefleet_agent.runtime.control import Loaded, Retired, Shadowing, StatusReport, SwapMode, Switched, VersionState
from edgefleet_agent.runtime.nursery import Nursery
from edgefleet_agent.runtime.shadow import Shadow
from edgefleet_agent.runtime.switchboard import Switchboard
from edgefleet_agent.runtime.version import Version
from edgefleet_agent.sandbox import resident_bytes

log = logging.getLogger("edgefleet.runtime")

_NOT_STARTED = (VersionState.STOPPED, VersionState.PREPARED)


class Orders:
    """What the agent wants to be loaded and to serve.

    Args:
        layout: the board's artifacts.
        threads: threads of one inference.
        nursery: what starts their processes.
        board: where requests find what is loaded.
    """

    def __init__(self, layout: Layout, threads: int, nursery: Nursery, board: Switchboard) -> None:
        self._layout, self._threads, self._nursery, self._board = layout, threads, nursery, board
        self._shadow: Shadow | None = None
        self._expected: list[Version] = []
        self._candidate: Version | None = None  # being loaded
        self._order = asyncio.Lock()  # one load, switch or retire at a time
        self._relieving: asyncio.Task[None] | None = None
        self._began = time.monotonic()
        self.swaps = 0

    async def load(self, manifest: str, mode: SwapMode = "auto") -> Loaded:
        """Check an artifact's bytes and, when memory holds both, start and warm its worker. What serves is not touched.

        Raises:
            EdgefleetError: bytes missing or changed, engine refused, the worker died or was too slow.
        """
        async with self._order:
            present = self._board.loaded.get(manifest)
            if present is not None and present.state is VersionState.RESTARTING:
                await present.returned()
            if present is not None and present.state is not VersionState.PREPARED:
                if present.state is not VersionState.READY or present.ready is None:
                    raise ConflictError(
                        f"{present.config.model} {present.config.version} is loaded but {present.state.value}: {present.last_problem}"
                    )
                return _loaded(present, "blue-green", "it was loaded already")
            version = await self._open(manifest)
            chosen, why = swap_mode.choose(version.config, mode, self._board.serving is not None)
            if chosen == "in-place":
                await turns.beside(partial(self._layout.check, self._layout.manifest(manifest).layer(MODEL_LAYER)))
                version.state = VersionState.PREPARED
                self._board.put(version)
                return Loaded(manifest=manifest, mode="in-place", why=why)
            self._candidate = version
            try:
                await version.start(aside=self._board.ready)
            finally:
                self._candidate = None
            self._board.put(version)
            return _loaded(version, "blue-green", why)

    async def switch(self, manifest: str) -> Switched:
        """Let a loaded artifact serve.

        Raises:
            NotFoundError: not loaded.
            EdgefleetError: in-place only: the new one did not start; the old one serves again.
        """
        async with self._order:
            version = self._board.loaded.get(manifest)
            if version is None:
                raise NotFoundError(f"{manifest} is not loaded", hint="load it first")
            old = self._board.serving
            previous = old.manifest if old is not None else None
            if version is old:
                return Switched(manifest=manifest, previous=previous, mode="blue-green")
            self._unfollow()
            if version.state is VersionState.PREPARED:
                parked_ms = await self._switch_in_place(version, old)
                return Switched(manifest=manifest, previous=previous, mode="in-place", parked_ms=parked_ms)
            if version.state is not VersionState.READY:
                raise ConflictError(f"{version.config.version} is {version.state.value}: {version.last_problem}")
            forgotten = self._board.standby
            self._board.serving = version
            # Going back to the standby means that what served was not good enough to fall back on.
            self._board.standby = None if version is forgotten else old
            self.swaps += 1
            self._board.sort_waiting()
            if forgotten is not None and forgotten is not version:
                await self._drop(forgotten)
            return Switched(manifest=manifest, previous=previous, mode="blue-green")

    async def shadow(self, manifest: str) -> Shadowing:
        """Let a loaded artifact follow what serves.

        Raises:
            NotFoundError: not loaded. ConflictError: it serves, nothing serves, or it has no worker beside what serves.
        """
        async with self._order:
            version, serving = self._board.loaded.get(manifest), self._board.serving
            if version is None:
                raise NotFoundError(f"{manifest} is not loaded", hint="load it first")
            if serving is None or version is serving:
                raise ConflictError("there is nothing that it could follow" if serving is None else "it serves")
            if version.state is not VersionState.READY:
                raise ConflictError(f"{version.config.version} is {version.state.value}", hint=version.last_problem)
            if _signature(version.config) != _signature(serving.config):
                raise ConflictError("it takes and gives other tensors than what serves")
            self._unfollow()
            self._shadow = Shadow(version)
            version.on_computed = self._shadow.timed
            serving.follow(self._shadow)
            return Shadowing(manifest, serving.manifest)

    def _unfollow(self) -> None:
        if self._shadow is None:
            return
        self._shadow.candidate.on_computed = None
        for version in self._board.loaded.values():
            version.follow(None)
        self._shadow = None

    async def retire(self, manifest: str) -> Retired:
        """Drain and stop a version that does not serve.

        Raises:
            ConflictError: it serves.
        """
        async with self._order:
            version = self._board.loaded.get(manifest)
            if version is not None:
                if version is self._board.serving:
                    raise ConflictError(f"{version.config.version} is serving", hint="switch to another version first")
                await self._drop(version)
            return Retired(manifest)

    def expect(self, manifests: list[str]) -> None:
        """Know what will serve before it can, so that a request for it waits. Call before the first request, then :meth:`serve_at_start`.

        Args:
            manifests: the artifacts to try, best first; one that can't be read is passed over.
        """
        for manifest in manifests:
            try:
                parsed = self._layout.manifest(manifest)
                self._expected.append(self._version(manifest, parsed, self._layout.config(parsed)))
            except EdgefleetError as exc:
                log.error("start_failed", extra={"digest": manifest, "problem": exc.message})
        if self._expected:
            self._board.let_serve(self._expected[0])

    async def serve_at_start(self) -> None:
        """Serve the first of the expected artifacts that loads; when none does, keep trying the first. An order that comes in between holds: what
        it switched to goes on serving, what it loaded is not loaded again."""
        tried = self._board.serving
        for version in self._expected:
            async with self._order:
                if self._board.serving is not tried:
                    return
                tried = self._board.loaded.get(version.manifest, version)
                self._board.let_serve(tried)
                try:
                    if tried.state in _NOT_STARTED:
                        await tried.start()
                except EdgefleetError as exc:
                    log.error("start_failed", extra={"digest": version.manifest, "problem": exc.message})
                    continue
                self._board.pump()
            log.info("serving", extra={"digest": version.manifest, "version": version.config.version})
            return
        if tried is not None:
            first = self._board.loaded.get(self._expected[0].manifest, self._expected[0])
            self._board.let_serve(first)
            if first.state in _NOT_STARTED:
                first.restart_soon()

    async def close(self) -> None:
        """Stop every worker, answering what is in flight; what is asked from here on is told so. May be called again."""
        self._board.closed = True
        for version in list(self._board.loaded.values()):
            await version.stop()
        if self._relieving is not None:
            await self._relieving
        self._board.close()

    async def _switch_in_place(self, version: Version, old: Version | None) -> float:
        self._board.parked = True
        began = time.monotonic()
        try:
            for other in [v for v in self._board.loaded.values() if v is not version]:
                await other.stop()
            try:
                await version.start()
            except EdgefleetError:
                if old is not None:
                    await self._bring_back(old)
                self._board.keep_only(old)
                raise
            self._board.serving = version
            self.swaps += 1
            self._board.keep_only(version)
        finally:
            self._board.parked = False
            self._board.sort_waiting()
        return (time.monotonic() - began) * 1e3

    async def _bring_back(self, old: Version) -> None:
        try:
            await old.start()
        except EdgefleetError as exc:
            log.error("old_version_did_not_return", extra={"digest": old.manifest, "problem": exc.message})
            old.restart_soon()

    async def _drop(self, version: Version) -> None:
        if self._shadow is not None and version is self._shadow.candidate:
            self._unfollow()
        self._board.loaded.pop(version.manifest, None)
        if version is self._board.standby:
            self._board.standby = None
        await version.stop()

    async def _open(self, manifest: str) -> Version:
        # Each step takes as long as a small request; those that came meanwhile go first.
        parsed = self._layout.manifest(manifest)
        await asyncio.sleep(0)
        config = self._layout.config(parsed)
        await asyncio.sleep(0)
        version = self._version(manifest, parsed, config)
        await asyncio.sleep(0)
        return version

    def _version(self, manifest: str, parsed: Manifest, config: ModelConfig) -> Version:
        return Version(
            manifest,
            parsed,
            config,
            self._layout,
            self._threads,
            self._nursery,
            on_room=self._board.pump,
            on_orphans=self._board.orphans,
            on_refused=self._board.refused,
        )

    def tick(self) -> None:
        """Kill a candidate that outgrew its memory; relieve a worker that comes near that. Call a few times a second."""
        if self._candidate is not None:
            self._candidate.check_memory()
        serving = self._board.serving
        # While there is a standby it answers until a worker is back; and what is on trial must not have its growth hidden.
        if serving is None or self._board.standby is not None or self._order.locked() or self._board.closed:
            return
        if serving.is_to_be_relieved(time.monotonic()):
            self._relieving = asyncio.get_running_loop().create_task(self._relieve(serving))

    async def _relieve(self, version: Version) -> None:
        async with self._order:
            if not version.is_to_be_relieved(time.monotonic()):
                return
            chosen, why = swap_mode.choose(version.config, "auto", True)
            if chosen == "in-place":
                version.put_relief_off()
                log.info("worker_not_relieved", extra={"digest": version.manifest, "problem": why})
                return
            await version.relieve()

    def status(self) -> StatusReport:
        rows = (
            v.status(serving=v is self._board.serving, standby=v is self._board.standby) for v in self._board.versions()
        )
        return StatusReport(
            serving=self._board.serving.manifest if self._board.serving else None,
            standby=self._board.standby.manifest if self._board.standby else None,
            versions=tuple(rows),
            waiting=self._board.waiting,
            requests=self._board.requests,
            failed=self._board.failed,
            swaps=self.swaps,
            pid=os.getpid(),
            memory_bytes=resident_bytes(os.getpid()),
            uptime_s=time.monotonic() - self._began,
            shadow=self._shadow.figures() if self._shadow else None,
        )


def _signature(config: ModelConfig) -> tuple[object, ...]:
    return (config.model, config.inputs, config.outputs)


def _loaded(version: Version, mode: Literal["blue-green", "in-place"], why: str) -> Loaded:
    assert version.ready is not None
    return Loaded(
        manifest=version.manifest,
        mode=mode,
        why=why,
        providers=version.ready.providers,
        load_ms=version.ready.load_ms,
        first_ms=version.ready.first_ms,
    )
