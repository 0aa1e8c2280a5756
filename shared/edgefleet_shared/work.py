"""Stage 2, compile: what a worker and the controller say to each other over HTTPS, each by its certificate (ADR 0015).

::

    worker                          controller
      claim ───────────────────────▶ a task, leased: CompileTask or MeasureTask, or nothing to do
      blobs by digest ◀────────────▶
      log ─────────────────────────▶
      progress ────────────────────▶ renews the lease; Going says whether to go on
      wish to have measured ───────▶ a MeasureTask for a builder board of the class; Answer, once there is one
      ended: blobs by digest, then the result; or the error, or that it
      is given back ───────────────▶ the lease ends

A lease that is not renewed for ``lease_s`` ends, and its job is given to the next who asks. What comes late is refused.
The worker's end is :mod:`edgefleet_shared.work_client` and :mod:`edgefleet_shared.work_loop`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from edgefleet_shared.contract import AcceptanceReport

RENEWALS = 4  # in the time of one lease: three may be lost
POLL_S = 2.0  # how often a worker asks for work, and for an answer
AGENT = "edgefleet"  # User-Agent of an enrolment and of a worker's calls: this, a slash, the version that it runs
IDENTITY_PREFIX = "worker:"  # of a worker's name in its certificate; no board's name can have it


class CompileTask(msgspec.Struct, frozen=True, kw_only=True, tag="compile"):
    """Compile a model version (a digest) for a device class (its manifest as JSON). ``blobs`` is what must be fetched for it,
    ``builder`` whether a builder board of the class is there to measure."""

    lease: str
    lease_s: float
    job: str
    version: str
    device_class: str
    ship_despite_quality: bool
    builder: bool
    blobs: tuple[str, ...]


class MeasureTask(msgspec.Struct, frozen=True, kw_only=True, tag="measure"):
    """Accept an artifact (its manifest's digest) on this board and say what was measured. Nothing is installed."""

    lease: str
    lease_s: float
    job: str
    manifest: str
    blobs: tuple[str, ...]


Task = CompileTask | MeasureTask


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """What is being done: ``done`` of ``total``."""

    doing: str
    done: int
    total: int


class Log(msgspec.Struct, frozen=True):
    """What a job's toolchains printed, for people."""

    text: str


class Going(msgspec.Struct, frozen=True):
    """Whether the job is still wanted; a cancelled one is not."""

    go_on: bool


class Wish(msgspec.Struct, frozen=True):
    """An artifact that a builder board of its class shall measure; its blobs were uploaded before."""

    manifest: str


class Wished(msgspec.Struct, frozen=True):
    """The measuring job's id; empty where no builder board of the class is there to do it."""

    job: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a wish. ``by`` is the builder board; ``report`` is None unless it was measured."""

    state: Literal["waiting", "measured", "unmeasured"]
    report: AcceptanceReport | None = None
    by: str = ""


class Failure(msgspec.Struct, frozen=True):
    """An error as :meth:`~edgefleet_shared.errors.EdgefleetError.as_dict` gives it."""

    error: dict[str, str]
