"""One model version over the lives of its workers: receives jobs, hands on answers; restarts a worker that died, with back-off."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

import msgspec
from edgefleet_shared.artifact import GOLDEN_LAYER, MODEL_LAYER, Layout, Manifest, ModelConfig
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.errors import EdgefleetError, EngineError, NotFoundError

from edgefleet_agent.runtime import protocol
from edgefleet_agent.runtime.channel import Ready, Start
from edgefleet_agent.runtime.control import VersionState, VersionStatus
from edgefleet_agent.runtime.job import Job, Lease
from edgefleet_agent.runtime.metrics import Figures
from edgefleet_agent.runtime.nursery import Nursery
from edgefleet_agent.runtime.protocol import OutputTensor, RequestError
from edgefleet_agent.runtime.shadow import Shadow
from edgefleet_agent.runtime.shm import PAGE_BYTES
from edgefleet_agent.runtime.tensors import NUMPY, element_count
from edgefleet_agent.runtime.worker_process import WorkerProcess
from edgefleet_agent.sandbox import resident_bytes

log = logging.getLogger("edgefleet.runtime")

SLOTS = 6  # one is computed, the others are filled meanwhile
SLOT_ROWS = 16  # a request may be a batch of that many pictures
MAX_HEAD_BYTES = 1024  # of the JSON before a tensor that is read from the socket into its slot
MIN_SLOT_BYTES, MAX_SLOT_BYTES = 256 * 1024, 64 * 1024 * 1024
BACKOFF_FIRST_S, BACKOFF_LAST_S = 0.05, 10.0
HEALTHY_AFTER_S = 30.0  # a worker that lived this long starts the back-off anew
# A worker whose memory grows is relieved before it is at its limit, so that no request waits for the next one's load: at this share of the
# limit, once it has served for so long, and for ten times as long as it loaded. What grows faster is a regression, which must be heard of.
RELIEVED_AT, RELIEVED_AFTER_S, RELIEVED_AFTER_LOADS = 0.8, 60.0, 10
# A version may need more to serve than its acceptance saw: batches, and what the engine keeps of them.
MEMORY_SLACK, MEMORY_SLACK_BYTES = 2.0, 64 * 1024 * 1024
MAX_ATTEMPTS = 3  # a request that killed this many workers is not given to another


class Version:
    """A loaded artifact.

    Args:
        manifest_digest: which one.
        on_room: called when it can take another job, or none any more.
        on_orphans: jobs whose worker died, oldest first, to be placed again.
        on_refused: a job that the engine refused, or that does not fit the model, and why.
    """

    def __init__(
        self,
        manifest_digest: str,
        manifest: Manifest,
        config: ModelConfig,
        layout: Layout,
        threads: int,
        nursery: Nursery,
        *,
        on_room: Callable[[], None],
        on_orphans: Callable[[list[Job]], None],
        on_refused: Callable[[Version, Job, RequestError], None],
    ) -> None:
        self.manifest, self.config = manifest_digest, config
        self.state = VersionState.STOPPED
        self.figures = Figures(config.statistics)
        self.waiting: deque[Job] = deque()  # jobs pinned to this version
        self.last_problem = ""
        self.ready: Ready | None = None
        self._nursery = nursery
        self._on_room, self._on_orphans, self._on_refused = on_room, on_orphans, on_refused
        self._worker: WorkerProcess | None = None
        self._relief: WorkerProcess | None = None  # loads, and will take over from it
        self._relief_at = 0.0
        self._shadow: Shadow | None = None
        self.on_computed: Callable[[int], None] | None = None
        self._restart: asyncio.Task[None] | None = None
        self._crashes_in_row = 0
        self._started_at = 0.0
        model, golden = manifest.layer(MODEL_LAYER), manifest.layer(GOLDEN_LAYER)
        answers, inputs = _slot_bytes(config.outputs), _slot_bytes(config.inputs)
        self.max_rows = _rows(config, inputs, answers)
        own = int(config.contract.peak_memory_bytes * MEMORY_SLACK) + MEMORY_SLACK_BYTES
        # What is resident counts the shared memory too, which the front gave it.
        self.memory_limit_bytes = own + SLOTS * (inputs + answers)
        plain = msgspec.json.encode(msgspec.structs.replace(config, chunks={}))
        self._start = Start(
            str(layout.root.resolve()), manifest_digest, model.digest, model.size, golden.digest, plain, threads,
            SLOTS, inputs, answers, _picture_bytes(config.inputs) or PAGE_BYTES, self.memory_limit_bytes,
        )  # fmt: skip
        # A model's own acceptance says how slow it may be; the rest is a loaded board's.
        self.hang_limit_s = max(10.0, config.contract.latency_p95_ms * 20 / 1000)

    @property
    def pid(self) -> int:
        return self._worker.pid if self._worker is not None else 0

    @property
    def in_flight(self) -> int:
        return self._worker.in_flight if self._worker is not None else 0

    @property
    def free_slots(self) -> int:
        return self._worker.free_slots if self._worker is not None else 0

    @property
    def has_room(self) -> bool:
        return self.state is VersionState.READY and self._worker is not None and self._worker.has_room

    def status(self, *, serving: bool, standby: bool) -> VersionStatus:
        """What the runtime tells of it."""
        p50, p95 = self.figures.percentiles_ms() or (None, None)
        return VersionStatus(
            manifest=self.manifest,
            model=self.config.model,
            version=self.config.version,
            engine=self.config.engine,
            state=self.state.value,
            serving=serving,
            standby=standby,
            requests=self.figures.requests,
            failed=self.figures.failed,
            crashes=self.figures.crashes,
            starved=self.figures.starved,
            retried=self.figures.retried,
            p50_ms=p50,
            p95_ms=p95,
            in_flight=self.in_flight,
            pid=self.pid,
            memory_bytes=resident_bytes(self.pid) if self.pid else 0,
            providers=self.ready.providers if self.ready else (),
            unconfined=self.ready.unconfined if self.ready else (),
            last_problem=self.last_problem,
            drift=self.figures.drift.figures(),
        )

    def follow(self, shadow: Shadow | None) -> None:
        """Have a candidate follow what this version is asked, or none any more."""
        self._shadow = shadow
        if self._worker is not None:
            self._worker.shadow = shadow

    async def start(self, *, aside: bool = False) -> Ready:
        """Start a worker and wait until it is warm.

        Args:
            aside: another version serves meanwhile and must not feel it.

        Raises:
            EdgefleetError: it could not load; nothing is left running.
        """
        self.state = VersionState.STARTING
        try:
            self.ready = await self._launch(self._process(), aside)
        except EdgefleetError as exc:
            self.state, self.last_problem = VersionState.STOPPED, exc.message
            raise
        self._up()
        return self.ready

    def lend(self, body_bytes: int, header_bytes: int) -> Lease | None:
        """A slot for a body that is coming, None when the worker has none to spare."""
        return self._worker.lend(body_bytes, header_bytes) if self.has_room and self._worker is not None else None

    def submit(self, job: Job) -> bool:
        """Give a job to the worker; False when it has no room or is not ready. A job that can't be served here is refused here."""
        worker = self._worker
        if worker is None or self.state is not VersionState.READY or not worker.has_room:
            return False
        try:
            if job.request.form.fits is not self.config:
                protocol.check(job.request.form, self.config)
            return worker.submit(job)
        except RequestError as exc:
            self._on_refused(self, job, exc)
            return True

    def check_hang(self, missed_s: float) -> None:
        """Kill the worker when a job has been computed for too long; the job is placed again like after any crash.

        Args:
            missed_s: for how long this process has just stood still: a paused container's worker is not a hanging one.
        """
        if self._worker is not None and self._worker.oldest_age_s(missed_s) > self.hang_limit_s:
            self._worker.kill(f"did not answer within {self.hang_limit_s:g} s")

    def check_memory(self) -> None:
        """Kill the worker when it holds more memory than its artifact's contract leaves it; its jobs are placed again."""
        for worker in (self._worker, self._relief):
            if worker is not None and worker.pid and (problem := self._overgrown(worker.pid)):
                worker.kill(problem)

    def is_to_be_relieved(self, now: float) -> bool:
        """Whether its worker comes near its memory limit, and the next one should be loaded before it is there."""
        if self.state is not VersionState.READY or not self.pid or now < self._relief_at:
            return False
        try:
            return resident_bytes(self.pid) > RELIEVED_AT * self.memory_limit_bytes
        except OSError:  # no descriptor is left to look with; the next look comes soon
            return False

    def put_relief_off(self) -> None:
        """Not now: what loads takes time from what serves."""
        load_s = self.ready.load_ms / 1000 if self.ready is not None else 0.0
        self._relief_at = time.monotonic() + max(RELIEVED_AFTER_S, RELIEVED_AFTER_LOADS * load_s)

    async def relieve(self) -> None:
        """Let a fresh worker take over; the one before answers what it has. When the fresh one does not load, all stays as it is."""
        worker = self._relief = self._process()
        self.put_relief_off()
        try:
            ready = await self._loaded(worker, aside=True)
        except EdgefleetError as exc:
            log.error("worker_not_relieved", extra={"digest": self.manifest, "problem": exc.message})
            if self.state is VersionState.RESTARTING:  # the one before died meanwhile, and waited for this one
                self.restart_soon()
            return
        finally:
            self._relief = None
        if self.state not in (VersionState.READY, VersionState.RESTARTING):
            worker.kill("was not wanted any more")
            return
        before, self._worker, self.ready = self._worker, worker, ready
        worker.shadow = self._shadow
        self.figures.relieved += 1
        self.last_problem = f"its worker came near its limit of {self.memory_limit_bytes >> 20} MiB, and was relieved"
        log.warning("worker_relieved", extra={"digest": self.manifest, "problem": self.last_problem})
        self._up()
        if before is not None:
            await before.stop()

    def give_memory_back(self, now: float) -> None:
        """See :meth:`.WorkerProcess.give_memory_back`."""
        if self._worker is not None:
            self._worker.give_memory_back(now)

    def _overgrown(self, pid: int) -> str:
        """How a process broke its memory limit; empty when it did not."""
        try:
            resident = resident_bytes(pid)
        except OSError:  # no descriptor is left to look with; the next look comes soon
            return ""
        if resident <= self.memory_limit_bytes:
            return ""
        return f"outgrew its {self.memory_limit_bytes >> 20} MiB of memory: it held {resident >> 20} MiB"

    def restart_soon(self) -> None:
        """Bring the worker back after a failed start, with back-off."""
        self.state = VersionState.RESTARTING
        self._restart = asyncio.get_running_loop().create_task(self._restart_with_backoff())

    async def returned(self) -> None:
        """Wait until the worker that died has come back; no longer than a start may take."""
        if self._restart is not None:
            await asyncio.wait({self._restart}, timeout=self.config.contract.time_limit_s)

    async def stop(self) -> None:
        """Answer what is in flight, then end the worker. Idempotent."""
        self.state = VersionState.STOPPED
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
        if self._relief is not None:
            self._relief.kill("was not wanted any more")
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.stop()
        self.send_away()

    def send_away(self) -> None:
        """Tell whoever waits for this version that it is gone."""
        while self.waiting:
            self.waiting.popleft().failure(
                RequestError(404, f"{self.config.model} version {self.config.version} is not loaded any more")
            )

    def _process(self) -> WorkerProcess:
        worker = WorkerProcess(
            self.config,
            self._start,
            self._nursery,
            on_done=self._done,
            on_refused=self._refused,
            on_free=self._on_room,
            on_observed=self.figures.drift.add,
            on_end=lambda problem, jobs: self._ended(worker, problem, jobs),
        )
        worker.shadow = self._shadow
        return worker

    async def _launch(self, worker: WorkerProcess, aside: bool = False) -> Ready:
        self._worker = worker
        try:
            return await self._loaded(worker, aside)
        except BaseException:
            self._worker = None
            raise

    async def _loaded(self, worker: WorkerProcess, aside: bool) -> Ready:
        ready = await worker.start(self.config.contract.time_limit_s, aside=aside)
        if not worker.has_room:  # both were read in one turn; nobody would be told of its end any more
            worker.kill("ended as soon as it was loaded")
            raise EngineError("the worker ended as soon as it was loaded")
        if problem := self._overgrown(worker.pid):
            worker.kill(problem)
            raise EngineError(f"the worker {problem} once it was loaded")
        return ready

    def _up(self) -> None:
        self.state, self._started_at = VersionState.READY, time.monotonic()
        self.put_relief_off()
        if self.ready is not None and self.ready.unconfined:
            log.warning("worker_not_confined", extra={"digest": self.manifest, "missing": self.ready.unconfined})
        if self._worker is not None and self._worker.output:
            log.info("worker_loaded", extra={"digest": self.manifest, "output": self._worker.output})
        self._on_room()

    def _done(self, job: Job, outputs: list[OutputTensor], compute_ns: int) -> None:
        latency_ns = time.perf_counter_ns() - job.arrived_ns
        job.answer(self.config.model, self.config.version, outputs)
        # Counted while the answer is on its way.
        pictures = job.request.form.inputs[0].shape[0] if self.max_rows else 1
        self.figures.answered(latency_ns, max(0, latency_ns - compute_ns), compute_ns, pictures, job.arrived_ns)
        if self.on_computed is not None:
            self.on_computed(compute_ns)
        if self._shadow is not None:
            self._shadow.answered(job, outputs, compute_ns)

    def _refused(self, job: Job, error: RequestError) -> None:
        if self._shadow is not None:
            self._shadow.lost(job)
        if error.status >= 500:  # what the client did wrong does not count against the model
            self.figures.refused(time.perf_counter_ns() - job.arrived_ns)
        self._on_refused(self, job, error)

    def _ended(self, worker: WorkerProcess, problem: str, unanswered: list[Job]) -> None:
        if problem:
            log.error(
                "worker_ended",
                extra={
                    "digest": self.manifest,
                    "problem": problem,
                    "unanswered": len(unanswered),
                    "output": worker.output,
                },
            )
        if self._shadow is not None:
            for job in unanswered:
                self._shadow.lost(job)
        unanswered = [job for job in unanswered if not _given_up(job, problem)]
        if unanswered:
            # Only the oldest was being computed; the others merely stood behind it.
            unanswered[0].attempts += 1
            self.figures.retried += len(unanswered)
            if unanswered[0].attempts >= MAX_ATTEMPTS:
                job = unanswered.pop(0)
                self.figures.refused(time.perf_counter_ns() - job.arrived_ns)
                job.failure(
                    RequestError(500, f"the model's process died {job.attempts} times on this request ({problem})")
                )
        if worker is self._worker:
            self._worker = None
            if self.state is VersionState.READY:
                self._count(worker)
                self.last_problem = problem
                if time.monotonic() - self._started_at > HEALTHY_AFTER_S:
                    self._crashes_in_row = 0
                if self._relief is not None:
                    self.state = VersionState.RESTARTING
                else:
                    self.restart_soon()
        self._on_orphans(unanswered)

    def _count(self, ended: WorkerProcess) -> None:
        """A worker that ended by itself says something of the model, unless it had to go for others."""
        if ended.starved:
            self.figures.starved += 1
        else:
            self.figures.crashes += 1

    async def _restart_with_backoff(self) -> None:
        while True:
            delay = min(BACKOFF_FIRST_S * 2**self._crashes_in_row, BACKOFF_LAST_S)
            self._crashes_in_row = min(self._crashes_in_row + 1, 16)
            await asyncio.sleep(delay)
            worker = self._process()
            try:
                self.ready = await self._launch(worker)
            except EdgefleetError as exc:
                # What the board had no room to start is nothing that died, nor is a plan that the agent is still building.
                if worker.pid and not isinstance(exc, NotFoundError):
                    self._count(worker)
                self.last_problem = exc.message
                log.error("worker_restart_failed", extra={"digest": self.manifest, "problem": exc.message})
                continue
            self._up()
            return


def _given_up(job: Job, problem: str) -> bool:
    """Whether a job whose worker died is over with it."""
    if not job.is_live:
        job.failure(RequestError(500, f"the model's process died ({problem})"))
    return not job.is_live


def _picture_bytes(tensors: tuple[TensorSpec, ...]) -> int | None:
    """Memory for the inputs or the outputs of one picture; None where the model leaves their sizes open."""
    total = 0
    for spec in tensors:
        if any(n < 0 for n in spec.shape[1:]):
            return None
        total += element_count([abs(n) for n in spec.shape]) * NUMPY[spec.datatype].itemsize + MAX_HEAD_BYTES
    return total


def _rows(config: ModelConfig, input_bytes: int, answer_bytes: int) -> int:
    """How many pictures one request may be of, as far as sizes are known; 0 for a model that takes no batches."""
    if not all(spec.shape[:1] == (-1,) for spec in (*config.inputs, *config.outputs)):
        return 0
    asked = input_bytes // (_picture_bytes(config.inputs) or input_bytes)
    answered = answer_bytes // (_picture_bytes(config.outputs) or 1)
    return max(1, min(SLOT_ROWS, asked, answered))


def _slot_bytes(tensors: tuple[TensorSpec, ...]) -> int:
    """Memory for one request: :data:`SLOT_ROWS` pictures, or much where sizes are open."""
    one = _picture_bytes(tensors)
    if one is None:
        return MAX_SLOT_BYTES // 4
    return max(MIN_SLOT_BYTES, min(one * SLOT_ROWS, MAX_SLOT_BYTES)) // PAGE_BYTES * PAGE_BYTES
