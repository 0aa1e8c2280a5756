"""Stage 2, compile: a worker's loop. Receives a client and what carries out a task, claims, keeps leases, until it is told to stop.

Compile workers and builder boards share it: standard library only. What is said on the line is :mod:`edgefleet_shared.work_client`'s.
"""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from edgefleet_shared import work
from edgefleet_shared.errors import ConflictError, EdgefleetError, EnvironmentProblem, TransportError, TrustError
from edgefleet_shared.work_client import WorkClient
from edgefleet_shared.work_renewal import keep_renewed

log = logging.getLogger(__name__)

T = TypeVar("T")
RETRY_S = 5.0


class Held:
    """A lease that is renewed, in a thread of its own, for as long as the ``with`` block lasts.

    Args:
        on_end: called once, when the job is no longer wanted or the lease has ended: whoever works on it should stop.
    """

    def __init__(
        self, client: WorkClient, lease: str, lease_s: float, on_end: Callable[[], None] = lambda: None
    ) -> None:
        self._client, self.lease, self._lease_s, self.on_end = client, lease, lease_s, on_end
        self.step = work.Progress("begun", 0, 1)
        self.ended = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Held:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def persistently(self, call: Callable[[], T]) -> T:
        """Call until the controller can be reached: it may be starting again, and the lease outlives that.

        Raises:
            ConflictError: the lease ended first. EdgefleetError: what the controller answered.
        """
        while True:
            try:
                return call()
            except TransportError as exc:
                log.warning("controller out of reach", extra={"reason": str(exc)})
                if self.ended.wait(work.POLL_S):
                    raise ConflictError("the lease has ended") from exc

    def _renew(self) -> None:
        heard = time.monotonic()
        while not self._done.wait(self._lease_s / work.RENEWALS):
            try:
                wanted = self._client.progress(self.lease, self.step)
                heard = time.monotonic()
            except (TransportError, EnvironmentProblem):  # out of reach, or its disk or database is
                wanted = time.monotonic() - heard < self._lease_s
            except EdgefleetError as exc:
                log.warning("lease ended", extra={"reason": str(exc)})
                wanted = False
            if not wanted:
                self.ended.set()
                self.on_end()
                return


def work_until(
    stopping: threading.Event, client: WorkClient, carry_out: Callable[[work.Task, Held], None]
) -> TrustError | None:
    """Claim one task after the other until told to stop; what goes wrong with one is told to the controller and ends nothing else.

    Args:
        stopping: set here, too, when the controller knows this worker no more.
        carry_out: does a task and hands in its result; raises what it failed by.

    Returns:
        that the controller knows it no more, in its words.
    """
    while not stopping.is_set():
        try:
            task = client.claim()
        except TrustError as exc:
            stopping.set()
            return exc
        except EdgefleetError as exc:
            log.warning("controller gives no work", extra={"code": exc.code, "reason": str(exc)})
            stopping.wait(RETRY_S * random.uniform(0.5, 1.5))  # noqa: S311 - jitter: not all at once when it is back
            continue
        if task is None:
            stopping.wait(work.POLL_S)
            continue
        log.info("job begun", extra={"job": task.job})
        with Held(client, task.lease, task.lease_s) as held:
            try:
                carry_out(task, held)
                log.info("job done", extra={"job": task.job})
            except EdgefleetError as exc:
                log.warning("job failed", extra={"job": task.job, "code": exc.code, "reason": str(exc)})
                if stopping.is_set():
                    with contextlib.suppress(EdgefleetError):  # else the lease ends by itself
                        client.give_back(task.lease)
                elif not held.ended.is_set():
                    _tell(held, client, exc)
                    # A machine that is in trouble lets others ask first.
                    stopping.wait(RETRY_S if isinstance(exc, EnvironmentProblem) else 0.0)
    return None


def run_until_signalled(
    client: WorkClient,
    carry_out: Callable[[work.Task, Held], None],
    *,
    at_once: int,
    end: Callable[[], None],
    renew: Callable[[], str],
) -> None:
    """Work until SIGTERM or SIGINT, on the main thread.

    Args:
        at_once: how many tasks.
        end: called after the signal: ends what is under way.
        renew: asks for another certificate (PEM); called beside the work when it is due.

    Raises:
        TrustError: the controller knows this worker no more.
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    # Nothing waits for it at the end: to ask takes long where the line is bad, and what is cut off is asked for again.
    renewing = threading.Thread(target=keep_renewed, args=(stopping, client, renew), name="renew", daemon=True)
    renewing.start()
    with ThreadPoolExecutor(at_once, thread_name_prefix="work") as pool:
        # The signals' handler runs in this thread, which therefore only waits.
        working = [pool.submit(work_until, stopping, client, carry_out) for _ in range(at_once)]
        for future in working:  # one that a fault of our own ended: whoever supervises this program shall know
            future.add_done_callback(lambda _: stopping.set())
        log.info("worker ready", extra={"workers": at_once})
        stopping.wait()
        end()
    for future in working:
        error = future.result()
        if error is not None:
            raise error


def _tell(held: Held, client: WorkClient, error: EdgefleetError) -> None:
    try:
        held.persistently(lambda: client.fail(held.lease, error.as_dict()))
    except EdgefleetError as exc:  # it was refused, or is another's by now
        log.warning("failure not taken", extra={"reason": str(exc)})
