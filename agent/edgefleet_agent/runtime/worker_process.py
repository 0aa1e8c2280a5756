"""One life of one worker process, seen from the front: receives jobs, hands on their outputs, or how the process ended."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable

from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.errors import EngineError, StarvedError, from_dict

from edgefleet_agent import out_of_memory
from edgefleet_agent.runtime import channel, protocol, shm
from edgefleet_agent.runtime.channel import Done, Failed, Observed, Ready, Refused, Run, Start
from edgefleet_agent.runtime.job import NO_MEMORY, Job, Lease
from edgefleet_agent.runtime.nursery import Child, Exit, Nursery
from edgefleet_agent.runtime.protocol import InputTensor, OutputTensor, RequestError
from edgefleet_agent.runtime.shadow import Shadow
from edgefleet_agent.runtime.tensors import NUMPY, element_count
from edgefleet_agent.sandbox import describe_exit

log = logging.getLogger("edgefleet.runtime")

EXIT_GRACE_S = 0.5  # between the end of a worker's channel and the end of the worker
PATIENCE_S = 10.0  # how long loading may stand aside: on a board that is always busy it would never end
LEAVING_S = 0.3  # and how long ending may
COMMON_SHARE = 16  # that part of a slot's answer memory is commonly needed: a slot is for as many pictures
TURN_ANSWERS, TURN_BYTES = 16, 1 << 20  # handed on before all else has its turn: a worker may be faster than this loop
KEPT_SLOTS = 2  # never lent: clients that are slow to fill theirs must not keep whole requests out


class WorkerProcess:
    """A worker process and the shared memory that leads to it.

    Args:
        start: what it loads.
        nursery: what starts processes.
        on_done: a job's outputs and the engine's time in ns.
        on_refused: the engine refused a job, or there is no memory for its answer; the process goes on.
        on_free: a slot became free.
        on_observed: what a request was like. Raises ValueError when that makes no sense.
        on_end: the process ended: how, and the jobs that it did not answer, oldest first.
    """

    def __init__(
        self,
        config: ModelConfig,
        start: Start,
        nursery: Nursery,
        *,
        on_done: Callable[[Job, list[OutputTensor], int], None],
        on_refused: Callable[[Job, RequestError], None],
        on_free: Callable[[], None],
        on_observed: Callable[[Observed], None],
        on_end: Callable[[str, list[Job]], None],
    ) -> None:
        self._config, self._start, self._nursery = config, start, nursery
        self._on_done, self._on_refused, self._on_free, self._on_end = on_done, on_refused, on_free, on_end
        self._on_observed = on_observed
        self._loop = asyncio.get_running_loop()
        self._jobs: dict[int, tuple[Job, int]] = {}  # by number; each with its slot
        self._busy_since_ns = 0  # since when the oldest of them has been computed
        self._may_observe = False
        self._free = list(range(start.slot_count))
        self._number = 0
        self._shapes: list[tuple[int, ...]] = []  # of the answer before, and where it lay
        self._places: list[tuple[TensorSpec, tuple[int, ...], int, int]] = []
        self._output_types = [NUMPY[spec.datatype] for spec in config.outputs]
        self._child: Child | None = None
        self._link: socket.socket | None = None
        self._unused: shm.Unused | None = shm.Unused(start.slot_count, time.monotonic())
        self._inputs: shm.Arena | None = None
        self._answers: shm.Arena | None = None
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self._buffer = memoryview(bytearray(channel.MAX_MESSAGE_BYTES))  # recv() would map as much for every message
        self._stopping = False
        self._verdict = ""  # why this side killed it, if it did
        self._kills_before = 0
        self.starved = False  # the kernel ended it for want of memory, or refused it some, of which it had taken no more than it may
        self.shadow: Shadow | None = None  # follows what this worker is asked

    @property
    def pid(self) -> int:
        return self._child.pid if self._child is not None else 0

    @property
    def output(self) -> str:
        """The end of what it printed."""
        return self._child.output.text if self._child is not None else ""

    @property
    def in_flight(self) -> int:
        return len(self._jobs)

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def has_room(self) -> bool:
        # Between the end of its channel and its own end nothing can be said to it any more.
        return bool(self._free) and self._link is not None

    async def start(self, limit_s: float, *, aside: bool) -> Ready:
        """Start the process and wait until its model is loaded and warm.

        Args:
            limit_s: how long that may take.
            aside: others serve meanwhile and must not feel it.

        Raises:
            EngineError or another EdgefleetError: how it failed; the process is gone. StarvedError: the board had no room for it.
        """
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as exc:
            raise StarvedError(f"no channel to a worker: {exc}") from exc
        given = [theirs.fileno()]
        self._kills_before = out_of_memory.kills()
        try:
            given += self._share()
            self._child = await self._nursery.spawn(given, aside=aside)
        except OSError as exc:
            ours.close()
            raise StarvedError(f"no memory to share with a worker: {exc}") from exc
        except EngineError:
            ours.close()
            raise
        finally:
            theirs.close()
            for fd in given[1:]:
                os.close(fd)
        ours.setblocking(False)
        self._link = ours
        self._loop.add_reader(ours.fileno(), self._readable)
        self._child.ended.add_done_callback(lambda ended: self._exited(ended.result()))
        try:
            ours.send(channel.encode(self._start))
        except OSError as exc:  # it died at once, or its model's config is longer than one message may be
            self.kill("could not be told what to load")
            await self._child.ended
            raise EngineError(f"the worker could not be told what to load: {exc.strerror}") from exc
        hurry = self._loop.call_later(min(PATIENCE_S, limit_s / 4), self._child.come_forward)
        try:
            ready = await asyncio.wait_for(asyncio.shield(self._ready), limit_s)
            self._child.come_forward()
            return ready
        except asyncio.TimeoutError:
            self.kill(f"did not finish loading within {limit_s:g} s")
            await self._child.ended
            raise EngineError(f"the worker {self._verdict}") from None
        except asyncio.CancelledError:
            self.kill("was not wanted any more")
            raise
        finally:
            hurry.cancel()

    def _share(self) -> list[int]:
        """Make the shared memory; returns the descriptors of inputs and answers, for the process."""
        start, fds, given = self._start, [], []
        try:
            fds += [shm.create(start.slot_count, start.input_bytes)]
            given += [shm.reading(fds[0])]
            fds += [shm.create(start.slot_count, start.answer_bytes)]
            given += [os.dup(fds[1])]
            self._inputs = shm.Arena(fds[0], start.slot_count, start.input_bytes, writable=True)
            # Nothing here writes answers, but pages are given back through what could.
            self._answers = shm.Arena(fds[1], start.slot_count, start.answer_bytes, writable=True, shown_writable=False)
            for fd in fds:
                shm.seal(fd)
        except OSError:
            for fd in given:
                os.close(fd)
            raise
        finally:
            for fd in fds:
                os.close(fd)
        return given

    def give_memory_back(self, now: float) -> None:
        """Let go of memory that only unusually large requests needed. Call a few times a second, with :func:`time.monotonic`."""
        start, unused = self._start, self._unused
        if unused is None or self._inputs is None or self._answers is None:
            return
        for job, slot in self._jobs.values():
            if sum(tensor.size for tensor in job.request.form.inputs) > start.touch_bytes:
                unused.saw_large(slot, now)
        index = unused.due(now)
        if index is None or index not in self._free:
            return
        try:
            self._inputs.give_back(index, start.touch_bytes)
            self._answers.give_back(index, start.answer_bytes // COMMON_SHARE)
        except OSError as exc:
            log.warning("memory_is_kept", extra={"problem": exc.strerror})
            self._unused = None

    def lend(self, body_bytes: int, header_bytes: int) -> Lease | None:
        """A slot for a body that is coming, so placed that what is behind its header is aligned; None when there is none to spare."""
        base = -header_bytes % shm.ALIGNMENT
        if len(self._free) <= KEPT_SLOTS or self._inputs is None or base + body_bytes > self._start.input_bytes:
            return None
        index = self._free.pop()
        return Lease(self, index, base + header_bytes, self._inputs.slots[index][base : base + body_bytes])

    def give_back(self, index: int) -> None:
        """A lent slot is free again."""
        if self._inputs is not None:
            self._free.append(index)
            self._on_free()

    def submit(self, job: Job) -> bool:
        """Hand a job to the process. Its form is already checked against the config.

        Returns:
            False when every slot is taken; try again at ``on_free``.

        Raises:
            RequestError: 413, the inputs do not fit one request's memory; 400, a shared memory region can't be read.
        """
        if self._link is None or self._inputs is None:
            return False
        lease = job.lease
        if lease is not None and lease.held and lease.owner is self and job.request.form.all_binary:
            lease.held = False  # the job has it from here on
            index, base, placed = lease.index, lease.data, job.request.form.placed
        else:
            if not self._free:
                return False
            index, base = self._free.pop(), 0
            try:
                placed = self._copy(protocol.plan(job.request, self._config), self._inputs.slots[index])
            except RequestError:
                self._free.append(index)
                raise
            if lease is not None:
                lease.release()
        self._number += 1
        job.sent_ns = time.perf_counter_ns()
        if not self._jobs:
            self._busy_since_ns = job.sent_ns
        self._jobs[self._number] = job, index
        try:
            self._link.send(channel.encode(Run(self._number, index, base, placed)))
        except OSError:
            # It is dying: its end finds this job among the unanswered ones.
            self._free.clear()
        if self.shadow is not None:  # while the worker computes
            self.shadow.sent(job, self._inputs.slots[index][base:], placed)
        return True

    def _copy(self, tensors: list[InputTensor], slot: memoryview) -> list[tuple[int, tuple[int, ...]]]:
        """Put the tensors into a slot; offset and shape of each there."""
        offset, placed = 0, []
        for tensor in tensors:
            placed.append((offset, tensor.shape))
            offset = shm.aligned(offset + tensor.size)
        if offset > len(slot):
            raise RequestError(413, f"the inputs have {offset} bytes, one request may have {len(slot)}")
        for tensor, (begin, _) in zip(tensors, placed, strict=True):
            target = slot[begin : begin + tensor.size]
            if callable(tensor.data):
                tensor.data(target)
            else:
                target[:] = tensor.data
        return placed

    def oldest_age_s(self, missed_s: float = 0.0) -> float:
        """How long the oldest job has been computed, its turn behind others not counted, nor, from now on, ``missed_s``; 0 when there is none."""
        self._busy_since_ns += int(missed_s * 1e9)
        return (time.perf_counter_ns() - self._busy_since_ns) / 1e9 if self._jobs else 0.0

    def kill(self, why: str) -> None:
        """Kill the process; ``why`` completes "the worker ..."."""
        self._verdict = self._verdict or why
        if self._child is not None:
            self._child.kill()

    async def stop(self, limit_s: float = 5.0) -> None:
        """End the process in peace once its jobs are answered; kill it when it takes longer than ``limit_s``."""
        self._stopping = True
        child = self._child
        if child is None:
            return
        deadline = self._loop.time() + limit_s
        while self._jobs and self._loop.time() < deadline and not child.ended.done():
            await asyncio.sleep(0.005)
        # Its end takes a while too: all its memory is given back.
        child.step_back()
        hurry = self._loop.call_later(LEAVING_S, child.come_forward)
        self._close_link()
        try:
            await asyncio.wait_for(asyncio.shield(child.ended), max(0.5, deadline - self._loop.time()))
        except asyncio.TimeoutError:
            self.kill("did not stop")
            await child.ended
        finally:
            hurry.cancel()

    def _readable(self, *, ended: bool = False) -> None:
        """Take what the process says; all of it only once it has ``ended``."""
        link, answers, answer_bytes = self._link, 0, 0
        while link is not None:
            try:
                length = link.recv_into(self._buffer)
            except BlockingIOError:
                return
            except OSError:
                length = 0
            if not length:
                # It is ending, and its exit status will say how; or it closed the channel, and nobody can hear it any more.
                self._close_link()
                self._loop.call_later(EXIT_GRACE_S, self.kill, "closed its channel")
                return
            job = None
            try:
                message = channel.decode_from_worker(self._buffer[:length])
                if isinstance(message, Done | Refused):
                    came = self._came_of(message)
                    job = self._answered(message)
                else:
                    self._take(message)
            except (ValueError, KeyError, IndexError) as exc:  # msgspec's errors are ValueErrors
                self.kill(f"sent a message that makes no sense ({exc})")
                return
            # What comes of it is not the worker's doing.
            if isinstance(message, Done | Refused) and job is not None:
                answers += 1
                if isinstance(came, RequestError):
                    self._refuse(job, message.slot, came)
                elif isinstance(message, Done):
                    answer_bytes += sum(len(tensor.data) for tensor in came)
                    self._free.append(message.slot)
                    self._on_done(job, came, message.compute_ns)
                    self._on_free()
            if not self._jobs:
                return  # it has nothing more to say now; whatever it says later wakes the loop
            if not ended and (answers >= TURN_ANSWERS or answer_bytes >= TURN_BYTES):
                return  # and what it has said already does so too
            link = self._link

    def _answered(self, message: Done | Refused) -> Job:
        """The job that it says it is through with.

        Raises:
            KeyError, ValueError: it was not given that, or not there. Believed, it could have one client's picture put over another's. Or it
            tells a time that it did not have.
        """
        job, given = self._jobs[message.number]
        if message.slot != given:
            raise ValueError(f"job {message.number} was in slot {given}, not in {message.slot}")
        now = time.perf_counter_ns()
        if isinstance(message, Done) and not 0 <= message.compute_ns <= now - job.sent_ns:
            raise ValueError(f"it can't have computed for {message.compute_ns} ns")
        del self._jobs[message.number]
        self._busy_since_ns = now
        self._may_observe = True
        return job

    def _came_of(self, message: Done | Refused) -> list[OutputTensor] | RequestError:
        """The outputs of a job, or why there are none.

        Raises:
            ValueError, IndexError: what it says makes no sense.
        """
        if isinstance(message, Refused):
            return RequestError(400 if message.unserved else 500, message.message)
        try:
            return self._outputs(message.slot, message.shapes)
        except MemoryError:  # of this process's; the worker has done its part
            return RequestError(503, NO_MEMORY)

    def _refuse(self, job: Job, slot: int, error: RequestError) -> None:
        # A body that was read into the slot stays there: another version may be asked with it.
        if job.lease is None or not job.lease.take_back(self, slot):
            self._free.append(slot)
        self._on_refused(job, error)
        self._on_free()

    def _take(self, message: Observed | Ready | Failed) -> None:
        """What is said seldom. Whatever it is may be said once: one that never stops talking would keep this loop from all others.

        Raises:
            ValueError: it makes no sense.
        """
        match message:
            case Observed():
                if not self._may_observe:
                    raise ValueError("an observation of no request")
                self._may_observe = False
                self._on_observed(message)
            case Ready() | Failed():
                if self._ready.done():
                    raise ValueError("it was loaded already")
                if isinstance(message, Ready):
                    self._ready.set_result(message)
                else:
                    problem = from_dict(message.error)
                    self.starved = isinstance(problem, StarvedError)
                    self._ready.set_exception(problem)

    def _outputs(self, index: int, shapes: list[tuple[int, ...]]) -> list[OutputTensor]:
        """Copy the outputs out of a slot, so that it is free at once; a worker's numbers are not trusted."""
        assert self._answers is not None
        slot = self._answers.slots[index]
        if shapes != self._shapes:
            self._places, self._shapes = self._lay_out(shapes), shapes
        outputs = []
        for spec, shape, begin, end in self._places:
            outputs.append(OutputTensor(spec.name, spec.datatype, shape, slot[begin:end].tobytes()))
        return outputs

    def _lay_out(self, shapes: list[tuple[int, ...]]) -> list[tuple[TensorSpec, tuple[int, ...], int, int]]:
        """Where outputs of these shapes lie in a slot."""
        places, begin = [], 0
        for spec, dtype, shape in zip(self._config.outputs, self._output_types, shapes, strict=True):
            end = begin + element_count(shape) * dtype.itemsize
            if any(n < 0 for n in shape) or end > self._start.answer_bytes:
                raise ValueError(f"output {spec.name} of shape {shape} lies outside its slot")
            places.append((spec, shape, begin, end))
            begin = shm.aligned(end)
        return places

    def _exited(self, ended: Exit) -> None:
        if self._link is not None:
            self._readable(ended=True)  # answers that it gave before it died
        self._close_link()
        problem = self._verdict or describe_exit(ended.code)
        limit_bytes = self._start.memory_bytes
        if not self._verdict and out_of_memory.is_starved(
            ended.code, ended.peak_bytes, limit_bytes, self._kills_before
        ):
            self.starved = True
            problem += f": the board is out of memory; it held {ended.peak_bytes >> 20} of the {limit_bytes >> 20} MiB that it may"
        if not self._ready.done():
            said = self._child.output.last_words() if self._child is not None else ""
            kind = StarvedError if self.starved else EngineError
            self._ready.set_exception(kind(f"the worker {problem or 'ended'} while loading the model{said}"))
            self._ready.exception()  # seen: start() may have given up waiting
        unanswered, self._jobs = [job for job, _ in self._jobs.values()], {}
        self._free.clear()
        self._inputs = self._answers = None  # unmapped once no request looks into them any more
        # Whoever is told knows this process: kept, the two would be the collector's to find, and swaps would look like a leak.
        on_end, self._on_end = self._on_end, _nobody
        on_end("" if self._stopping and not unanswered else problem or "ended by itself", unanswered)

    def _close_link(self) -> None:
        if self._link is not None:
            self._loop.remove_reader(self._link.fileno())
            self._link.close()
            self._link = None


def _nobody(problem: str, jobs: list[Job]) -> None:
    """Has heard of its end already."""
