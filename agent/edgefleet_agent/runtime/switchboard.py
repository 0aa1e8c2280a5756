"""Stage 8, swap: receives requests and the agent's orders, hands each request to the version that serves.

Requests are computed one by one, in the order they came: putting several into one inference would make the first wait for the last.

Blue-green: the new version's worker is loaded and warm before one pointer moves; the old one stays as *standby* until it is
retired, and answers at once when the new one's worker dies. In-place, for boards that can't hold both: requests are parked
while the old worker stops and the new one starts; when the new one fails, the old one is started again.
A request is an inference, so it is idempotent: one whose worker died is computed again, by whichever version can.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from typing import Literal

from edgefleet_shared.artifact import MODEL_LAYER, Layout, Manifest, ModelConfig
from edgefleet_shared.errors import ConflictError, EdgefleetError, NotFoundError

from edgefleet_agent.runtime import protocol, swap_mode
from edgefleet_agent.runtime.control import Loaded, Retired, Shadowing, StatusReport, SwapMode, Switched
from edgefleet_agent.runtime.job import Job, Lease
from edgefleet_agent.runtime.nursery import Nursery
from edgefleet_agent.runtime.protocol import RequestError
from edgefleet_agent.runtime.shadow import Shadow
from edgefleet_agent.runtime.version import Version, VersionState
from edgefleet_agent.sandbox import resident_bytes

log = logging.getLogger("edgefleet.runtime")

MAX_WAITING = 1024  # requests without a worker; their bodies are bounded by the front
STOPPING = "the runtime is stopping"
WAIT_LIMIT_S = 60.0  # how long a request may wait for one
_NOT_STARTED = (VersionState.STOPPED, VersionState.PREPARED)
LATE_S = 1.0  # between two looks: this process itself did not run, nor maybe its workers


class Switchboard:
    """Which versions are loaded and which one serves.

    Args:
        layout: the board's artifacts.
        threads: threads of one inference.
        nursery: what starts their processes.
    """

    def __init__(self, layout: Layout, threads: int, nursery: Nursery) -> None:
        self._layout, self._threads, self._nursery = layout, threads, nursery
        self._loaded: dict[str, Version] = {}
        self._serving: Version | None = None
        self._standby: Version | None = None
        self._shadow: Shadow | None = None
        self._expected: list[Version] = []
        self._candidate: Version | None = None  # being loaded
        self._waiting: deque[Job] = deque()
        self._parked = self._closed = False
        self._order = asyncio.Lock()  # one load, switch or retire at a time
        self._began = self._looked_at = time.monotonic()
        self.requests = 0
        self.failed = 0
        self.swaps = 0

    # --- requests

    @property
    def ready(self) -> bool:
        """Whether a request for the model would be answered now."""
        return self._target() is not None

    @property
    def waiting(self) -> int:
        return len(self._waiting) + sum(len(v.waiting) for v in self._loaded.values())

    def versions(self) -> list[Version]:
        """Every loaded version, the serving one first."""
        return sorted(self._loaded.values(), key=lambda v: v is not self._serving)

    def is_serving(self, version: Version) -> bool:
        return version is self._serving

    def find(self, model: str, version: str | None) -> Version:
        """The version that answers for a model: the pinned one, else the one that serves, else another loaded one of that model.

        Raises:
            RequestError: 404 when this runtime does not have it.
        """
        serving = self._serving
        if serving is not None and serving.config.model == model and version in (None, serving.config.version):
            return serving
        for loaded in self.versions():
            if loaded.config.model == model and version in (None, loaded.config.version):
                return loaded
        name = model[:200] if version is None else f"{model[:200]} version {version[:200]}"
        raise RequestError(404, f"model {name!r} is not served here")

    def lend(self, model: str, version: str | None, header_length: str, body_bytes: int) -> Lease | None:
        """A slot of the worker that would get this request now, for a body that is still coming; None when there is none."""
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 12):
            return None
        if version is None:
            target = self._target() if not self._waiting else None
        else:
            target = next((v for v in self._loaded.values() if v.config.version == version), None)
        if target is None or target.config.model != model:
            return None
        return target.lend(body_bytes, int(header_length))

    def submit(self, job: Job) -> None:
        """Take a request; exactly one of ``job.answer`` and ``job.failure`` is called, now or later.

        Raises:
            RequestError: it can't be taken: unknown model, bad tensors, or too many are waiting.
        """
        serving = self._serving
        if serving is not None and self._is_plain(job, serving) and serving.submit(job):
            self.requests += 1
            return
        version = self.find(job.model, job.version)
        if job.version is None and (self._serving is None or version.config.model != self._serving.config.model):
            job.version = version.config.version  # another model than the one that is swapped: this version or none
        if not self._place(job):
            if self._closed:
                raise RequestError(503, STOPPING)
            protocol.check(job.request.form, version.config)  # a bad request need not wait to be told so
            if self.waiting >= MAX_WAITING:
                raise RequestError(503, f"{MAX_WAITING} requests are waiting for this model already")
            (self._waiting if job.version is None else version.waiting).append(job)
        self.requests += 1

    def _is_plain(self, job: Job, serving: Version) -> bool:
        """As a rule there is nothing to find out."""
        plain = job.version is None and not self._parked and not self._waiting
        return plain and job.model == serving.config.model

    def _place(self, job: Job) -> bool:
        if job.version is not None:
            version = self.find(job.model, job.version)
            return not version.waiting and version.submit(job)
        target = self._target()
        return not self._waiting and target is not None and target.submit(job)

    def _target(self) -> Version | None:
        """The version that computes requests without a pin just now."""
        if self._parked or self._serving is None:
            return None
        if self._serving.state is VersionState.READY:
            return self._serving
        standby = self._standby
        if (
            standby is not None
            and standby.state is VersionState.READY
            and standby.config.model == self._serving.config.model
        ):
            return standby
        return None

    def _pump(self) -> None:
        for version in list(self._loaded.values()):
            while version.waiting and version.has_room:
                version.submit(version.waiting.popleft())
        while self._waiting:
            target = self._target()
            if target is None or not target.has_room:
                return
            target.submit(self._waiting.popleft())

    def _orphans(self, jobs: list[Job]) -> None:
        """Let jobs wait, before all others, for the model that they asked for; by now that may be another one than what serves."""
        for job in reversed(jobs):
            if job.version is None and self._serving is not None and job.model == self._serving.config.model:
                self._waiting.appendleft(job)
                continue
            try:
                version = self.find(job.model, job.version)
            except RequestError as exc:
                job.failure(exc)
                continue
            job.version = version.config.version
            version.waiting.appendleft(job)
        self._pump()

    def _sort_waiting(self) -> None:
        """What serves has changed: whoever waits for another model waits for that model's own version."""
        waiting, self._waiting = list(self._waiting), deque()
        self._orphans(waiting)

    def _refused(self, version: Version, job: Job, error: RequestError) -> None:
        """What the new version can't answer, the one before it may still: a client that does not know yet that the inputs have changed, too. The
        new one's counter keeps the failure."""
        standby = self._standby
        if (
            job.version is not None
            or job.fell_back
            or standby is None
            or standby is version
            or standby.config.model != job.model
            or not protocol.fits(job.request.form, standby.config)
        ):
            job.failure(error)
            return
        job.fell_back = True
        standby.waiting.append(job)
        self._pump()

    def tick(self) -> None:
        """Fail requests that waited too long and kill workers that hang or outgrew their memory. Call a few times a second."""
        horizon = time.perf_counter_ns() - int(WAIT_LIMIT_S * 1e9)
        for queue in (self._waiting, *(v.waiting for v in self._loaded.values())):
            while queue and queue[0].arrived_ns < horizon:
                queue.popleft().failure(
                    RequestError(503, f"no worker was there for this request within {WAIT_LIMIT_S:g} s")
                )
        now = time.monotonic()
        missed_s, self._looked_at = now - self._looked_at, now
        for version in self._loaded.values():
            version.check_hang(missed_s if missed_s > LATE_S else 0.0)
            version.check_memory()
            version.give_memory_back(now)
        if self._candidate is not None:
            self._candidate.check_memory()

    # --- orders

    async def load(self, manifest: str, mode: SwapMode = "auto") -> Loaded:
        """Check an artifact's bytes and, when memory holds both, start and warm its worker. What serves is not touched.

        Raises:
            EdgefleetError: bytes missing or changed, engine refused, the worker died or was too slow.
        """
        async with self._order:
            present = self._loaded.get(manifest)
            if present is not None and present.state is VersionState.RESTARTING:
                await present.returned()
            if present is not None and present.state is not VersionState.PREPARED:
                if present.state is not VersionState.READY or present.ready is None:
                    raise ConflictError(
                        f"{present.config.model} {present.config.version} is loaded but {present.state.value}: {present.last_problem}"
                    )
                return _loaded(present, "blue-green", "it was loaded already")
            version = await self._open(manifest)
            chosen, why = swap_mode.choose(version.config, mode, self._serving is not None)
            if chosen == "in-place":
                await asyncio.to_thread(self._layout.check, self._layout.manifest(manifest).layer(MODEL_LAYER))
                version.state = VersionState.PREPARED
                self._put(version)
                return Loaded(manifest=manifest, mode="in-place", why=why)
            self._candidate = version
            try:
                await version.start(aside=self.ready)
            finally:
                self._candidate = None
            self._put(version)
            return _loaded(version, "blue-green", why)

    def _put(self, version: Version) -> None:
        """Keep what was loaded; whoever waits for it since it was loaded before, and never switched to, goes on waiting."""
        before, self._loaded[version.manifest] = self._loaded.get(version.manifest), version
        if before is not None:
            version.waiting.extend(before.waiting)
            self._pump()

    async def switch(self, manifest: str) -> Switched:
        """Let a loaded artifact serve.

        Raises:
            NotFoundError: not loaded.
            EdgefleetError: in-place only: the new one did not start; the old one serves again.
        """
        async with self._order:
            version = self._loaded.get(manifest)
            if version is None:
                raise NotFoundError(f"{manifest} is not loaded", hint="load it first")
            old = self._serving
            previous = old.manifest if old is not None else None
            if version is old:
                return Switched(manifest=manifest, previous=previous, mode="blue-green")
            self._unfollow()
            if version.state is VersionState.PREPARED:
                parked_ms = await self._switch_in_place(version, old)
                return Switched(manifest=manifest, previous=previous, mode="in-place", parked_ms=parked_ms)
            if version.state is not VersionState.READY:
                raise ConflictError(f"{version.config.version} is {version.state.value}: {version.last_problem}")
            forgotten = self._standby
            self._serving = version
            # Going back to the standby means that what served was not good enough to fall back on.
            self._standby = None if version is forgotten else old
            self.swaps += 1
            self._sort_waiting()
            if forgotten is not None and forgotten is not version:
                await self._drop(forgotten)
            return Switched(manifest=manifest, previous=previous, mode="blue-green")

    async def shadow(self, manifest: str) -> Shadowing:
        """Let a loaded artifact follow what serves.

        Raises:
            NotFoundError: not loaded. ConflictError: it serves, nothing serves, or it has no worker beside what serves.
        """
        async with self._order:
            version, serving = self._loaded.get(manifest), self._serving
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
        for version in self._loaded.values():
            version.follow(None)
        self._shadow = None

    async def retire(self, manifest: str) -> Retired:
        """Drain and stop a version that does not serve.

        Raises:
            ConflictError: it serves.
        """
        async with self._order:
            version = self._loaded.get(manifest)
            if version is not None:
                if version is self._serving:
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
            self._let_serve(self._expected[0])

    def _let_serve(self, version: Version) -> None:
        before = self._serving
        if before is not None:
            self._loaded.pop(before.manifest, None)
        self._loaded[version.manifest] = self._serving = version
        if before is not None and before is not version:
            before.send_away()
            self._sort_waiting()

    async def serve_at_start(self) -> None:
        """Serve the first of the expected artifacts that loads; when none does, keep trying the first. An order that comes in between holds: what
        it switched to goes on serving, what it loaded is not loaded again."""
        tried = self._serving
        for version in self._expected:
            async with self._order:
                if self._serving is not tried:
                    return
                tried = self._loaded.get(version.manifest, version)
                self._let_serve(tried)
                try:
                    if tried.state in _NOT_STARTED:
                        await tried.start()
                except EdgefleetError as exc:
                    log.error("start_failed", extra={"digest": version.manifest, "problem": exc.message})
                    continue
                self._pump()
            log.info("serving", extra={"digest": version.manifest, "version": version.config.version})
            return
        if tried is not None:
            first = self._loaded.get(self._expected[0].manifest, self._expected[0])
            self._let_serve(first)
            if first.state in _NOT_STARTED:
                first.restart_soon()

    async def close(self) -> None:
        """Stop every worker, answering what is in flight; what is asked from here on is told so. May be called again."""
        self._closed = True
        for version in list(self._loaded.values()):
            await version.stop()
        while self._waiting:
            self._waiting.popleft().failure(RequestError(503, STOPPING))

    async def _switch_in_place(self, version: Version, old: Version | None) -> float:
        self._parked = True
        began = time.monotonic()
        try:
            for other in [v for v in self._loaded.values() if v is not version]:
                await other.stop()
            try:
                await version.start()
            except EdgefleetError:
                if old is not None:
                    await self._bring_back(old)
                self._keep_only(old)
                raise
            self._serving = version
            self.swaps += 1
            self._keep_only(version)
        finally:
            self._parked = False
            self._sort_waiting()
        return (time.monotonic() - began) * 1e3

    def _keep_only(self, version: Version | None) -> None:
        """Forget every other version; none of them has a process any more, but somebody may have come meanwhile to wait for it."""
        self._standby = None
        for other in [v for v in self._loaded.values() if v is not version]:
            self._loaded.pop(other.manifest)
            other.send_away()

    async def _bring_back(self, old: Version) -> None:
        try:
            await old.start()
        except EdgefleetError as exc:
            log.error("old_version_did_not_return", extra={"digest": old.manifest, "problem": exc.message})
            old.restart_soon()

    async def _drop(self, version: Version) -> None:
        if self._shadow is not None and version is self._shadow.candidate:
            self._unfollow()
        self._loaded.pop(version.manifest, None)
        if version is self._standby:
            self._standby = None
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
            on_room=self._pump,
            on_orphans=self._orphans,
            on_refused=self._refused,
        )

    # --- status

    def status(self) -> StatusReport:
        rows = (v.status(serving=v is self._serving, standby=v is self._standby) for v in self.versions())
        return StatusReport(
            serving=self._serving.manifest if self._serving else None,
            standby=self._standby.manifest if self._standby else None,
            versions=tuple(rows),
            waiting=self.waiting,
            requests=self.requests,
            failed=self.failed,
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
