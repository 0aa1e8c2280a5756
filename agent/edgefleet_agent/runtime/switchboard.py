"""Which version computes a request: receives requests, hands each to the worker of a loaded version, or lets it wait for one.

Requests are computed one by one, in the order they came: putting several into one inference would make the first wait for the last.
The version that serves answers; while its worker is away, the *standby*, which served before it, does. A request is an inference, so it is
idempotent: one whose worker died is computed again, by whichever version can.
Not handled here: what is loaded, and what serves (:mod:`orders`).
"""

from __future__ import annotations

import time
from collections import deque

from edgefleet_agent.runtime import protocol
from edgefleet_agent.runtime.control import VersionState
from edgefleet_agent.runtime.job import Job, Lease
from edgefleet_agent.runtime.protocol import RequestError
from edgefleet_agent.runtime.version import Version

MAX_WAITING = 1024  # requests without a worker; their bodies are bounded by the front
STOPPING = "the runtime is stopping"
WAIT_LIMIT_S = 60.0  # how long a request may wait for one
LATE_S = 1.0  # between two looks: this process itself did not run, nor maybe its workers


class Switchboard:
    """The loaded versions by manifest, which one serves, and who waits.

    ``standby`` is what served before and may answer still. While it is ``parked``, requests without a version of their own wait; once
    it is ``closed``, nothing new is taken that would.
    """

    def __init__(self) -> None:
        self.loaded: dict[str, Version] = {}
        self.serving: Version | None = None
        self.standby: Version | None = None
        self.parked = self.closed = False
        self._waiting: deque[Job] = deque()
        self._looked_at = time.monotonic()
        self.requests = 0
        self.failed = 0

    # --- requests

    @property
    def ready(self) -> bool:
        """Whether a request for the model would be answered now."""
        return self._target() is not None

    @property
    def waiting(self) -> int:
        return len(self._waiting) + sum(len(v.waiting) for v in self.loaded.values())

    def versions(self) -> list[Version]:
        """Every loaded version, the serving one first."""
        return sorted(self.loaded.values(), key=lambda v: v is not self.serving)

    def is_serving(self, version: Version) -> bool:
        return version is self.serving

    def find(self, model: str, version: str | None) -> Version:
        """The version that answers for a model: the pinned one, else the one that serves, else another loaded one of that model.

        Raises:
            RequestError: 404 when this runtime does not have it.
        """
        serving = self.serving
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
            target = next((v for v in self.loaded.values() if v.config.version == version), None)
        if target is None or target.config.model != model:
            return None
        return target.lend(body_bytes, int(header_length))

    def submit(self, job: Job) -> None:
        """Take a request; exactly one of ``job.answer`` and ``job.failure`` is called, now or later.

        Raises:
            RequestError: it can't be taken: unknown model, bad tensors, or too many are waiting.
        """
        serving = self.serving
        if serving is not None and self._is_plain(job, serving) and serving.submit(job):
            self.requests += 1
            return
        version = self.find(job.model, job.version)
        if job.version is None and (self.serving is None or version.config.model != self.serving.config.model):
            job.version = version.config.version  # another model than the one that is swapped: this version or none
        if not self._place(job):
            if self.closed:
                raise RequestError(503, STOPPING)
            protocol.check(job.request.form, version.config)  # a bad request need not wait to be told so
            if self.waiting >= MAX_WAITING:
                raise RequestError(503, f"{MAX_WAITING} requests are waiting for this model already")
            (self._waiting if job.version is None else version.waiting).append(job)
        self.requests += 1

    def _is_plain(self, job: Job, serving: Version) -> bool:
        """As a rule there is nothing to find out."""
        plain = job.version is None and not self.parked and not self._waiting
        return plain and job.model == serving.config.model

    def _place(self, job: Job) -> bool:
        if job.version is not None:
            version = self.find(job.model, job.version)
            return not version.waiting and version.submit(job)
        target = self._target()
        return not self._waiting and target is not None and target.submit(job)

    def _target(self) -> Version | None:
        """The version that computes requests without a pin just now."""
        if self.parked or self.serving is None:
            return None
        if self.serving.state is VersionState.READY:
            return self.serving
        standby = self.standby
        if (
            standby is not None
            and standby.state is VersionState.READY
            and standby.config.model == self.serving.config.model
        ):
            return standby
        return None

    def tick(self) -> None:
        """Fail requests that waited too long and kill workers that hang or outgrew their memory. Call a few times a second."""
        horizon = time.perf_counter_ns() - int(WAIT_LIMIT_S * 1e9)
        for queue in (self._waiting, *(v.waiting for v in self.loaded.values())):
            while queue and queue[0].arrived_ns < horizon:
                queue.popleft().failure(
                    RequestError(503, f"no worker was there for this request within {WAIT_LIMIT_S:g} s")
                )
        now = time.monotonic()
        missed_s, self._looked_at = now - self._looked_at, now
        for version in self.loaded.values():
            version.check_hang(missed_s if missed_s > LATE_S else 0.0)
            version.check_memory()
            version.give_memory_back(now)

    # --- what is loaded

    def put(self, version: Version) -> None:
        """Keep what was loaded; whoever waits for it since it was loaded before, and never switched to, goes on waiting."""
        before, self.loaded[version.manifest] = self.loaded.get(version.manifest), version
        if before is not None:
            version.waiting.extend(before.waiting)
            self.pump()

    def let_serve(self, version: Version) -> None:
        before = self.serving
        if before is not None:
            self.loaded.pop(before.manifest, None)
        self.loaded[version.manifest] = self.serving = version
        if before is not None and before is not version:
            before.send_away()
            self.sort_waiting()

    def keep_only(self, version: Version | None) -> None:
        """Forget every other version; none of them has a process any more, but somebody may have come meanwhile to wait for it."""
        self.standby = None
        for other in [v for v in self.loaded.values() if v is not version]:
            self.loaded.pop(other.manifest)
            other.send_away()

    def close(self) -> None:
        """Nobody will compute what waits."""
        while self._waiting:
            self._waiting.popleft().failure(RequestError(503, STOPPING))

    # --- told by the versions

    def pump(self) -> None:
        for version in list(self.loaded.values()):
            while version.waiting and version.has_room:
                version.submit(version.waiting.popleft())
        while self._waiting:
            target = self._target()
            if target is None or not target.has_room:
                return
            target.submit(self._waiting.popleft())

    def orphans(self, jobs: list[Job]) -> None:
        """Let jobs wait, before all others, for the model that they asked for; by now that may be another one than what serves."""
        for job in reversed(jobs):
            if job.version is None and self.serving is not None and job.model == self.serving.config.model:
                self._waiting.appendleft(job)
                continue
            try:
                version = self.find(job.model, job.version)
            except RequestError as exc:
                job.failure(exc)
                continue
            job.version = version.config.version
            version.waiting.appendleft(job)
        self.pump()

    def sort_waiting(self) -> None:
        """What serves has changed: whoever waits for another model waits for that model's own version."""
        waiting, self._waiting = list(self._waiting), deque()
        self.orphans(waiting)

    def refused(self, version: Version, job: Job, error: RequestError) -> None:
        """What the new version can't answer, the one before it may still: a client that does not know yet that the inputs have changed, too. The
        new one's counter keeps the failure."""
        standby = self.standby
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
        self.pump()
