"""The controller's tables. Rows only: no rule lives here, and none of them goes over a wire.

Times are seconds since 1970, UTC. What only one module reads as a whole (a spec, a report) is JSON text in one column; what is
searched or joined has a column of its own.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, LargeBinary, Text
from sqlmodel import Field, SQLModel, UniqueConstraint

SCHEMA_VERSION = 7


class SchemaVersion(SQLModel, table=True):
    """One row: which schema this database has."""

    __tablename__ = "schema_version"
    id: int = Field(default=1, primary_key=True)
    version: int


class DeviceClass(SQLModel, table=True):
    __tablename__ = "device_class"
    name: str = Field(primary_key=True)
    spec: str = Field(sa_type=Text)  # JSON, the manifest as it was applied
    created_at: float


class Device(SQLModel, table=True):
    """A board. ``reported`` is its last ``reported`` message; ``proof`` whose word its result is (JSON, :class:`results.Proof`);
    ``must_sign`` says that a result without a signature is nobody's; ``agent_proof`` and ``agent_must_sign`` say the same about the result
    of its agent's own update; ``figures`` what the intake last knew of its health (JSON).

    ``assignment`` is the one in force about its model, ``agent_assignment`` the one about its agent; ``assignment_version`` the
    highest that was ever signed for it: it only rises.
    """

    __tablename__ = "device"
    name: str = Field(primary_key=True)
    device_class: str = Field(foreign_key="device_class.name", index=True)
    site: str = ""
    labels: str = Field(default="{}", sa_type=Text)
    certificate_serial: str = ""
    revoked: bool = False
    enrolled_at: float
    online: bool = False
    last_seen: float = 0.0
    boot: str = ""
    reported: str = Field(default="", sa_type=Text)
    reported_at: float = 0.0
    must_sign: bool = False
    proof: str = Field(default="", sa_type=Text)
    agent_must_sign: bool = False
    agent_proof: str = Field(default="", sa_type=Text)
    figures: str = Field(default="", sa_type=Text)
    assignment: str = ""
    assignment_version: int = 0
    agent_assignment: str = ""


class EnrolmentToken(SQLModel, table=True):
    """A one-time token, known by its sha256 only. ``label`` tells the operator which one it is. ``role`` is device or worker; a worker
    without a class compiles, one with a class is a builder board of it. ``certificate`` is what was given for it, as PEM, once it is spent."""

    __tablename__ = "enrolment_token"
    sha256: str = Field(primary_key=True)
    role: str = "device"
    device_class: str | None = Field(default=None, foreign_key="device_class.name")
    site: str = ""
    label: str = ""
    created_at: float
    expires_at: float
    used_at: float | None = None
    used_by: str = ""
    certificate: str = ""


class ModelVersion(SQLModel, table=True):
    """An immutable model version: its source by digest, and the manifest it came with (JSON). A version of the agent stands here too,
    under the name that no model may have; its source is its code."""

    __tablename__ = "model_version"
    model: str = Field(primary_key=True)
    version: str = Field(primary_key=True)
    source_digest: str
    spec: str = Field(sa_type=Text)
    created_at: float


class Artifact(SQLModel, table=True):
    """What a model version was compiled to for a class. ``state`` is compiled or signed; ``manifest_bytes`` the size of the
    manifest itself, ``size_bytes`` of everything that a board fetches; the rest is JSON."""

    __tablename__ = "artifact"
    __table_args__ = (UniqueConstraint("model", "version", "device_class"),)
    manifest: str = Field(primary_key=True)
    model: str = Field(index=True)
    version: str
    device_class: str = Field(foreign_key="device_class.name")
    manifest_bytes: int
    size_bytes: int = Field(sa_type=BigInteger)
    swap: str = "auto"
    state: str
    requirement: str = Field(sa_type=Text)
    quality: str = Field(default="{}", sa_type=Text)
    timings: str = Field(default="{}", sa_type=Text)
    created_at: float


class Worker(SQLModel, table=True):
    """A machine that does the compiler's work over HTTPS: it compiles, or, with a ``device_class``, measures as a builder board of it.

    ``renewed_serial`` names the certificates that it was given in place of that of ``certificate_serial``, with blanks between; until it has one
    of them renewed, it may show any. ``edgefleet`` is the version that it last said it runs.
    """

    __tablename__ = "worker"
    name: str = Field(primary_key=True)
    device_class: str | None = Field(default=None, foreign_key="device_class.name")
    certificate_serial: str
    renewed_serial: str = ""
    revoked: bool = False
    enrolled_at: float
    last_seen: float = 0.0
    edgefleet: str = ""


class CompileJob(SQLModel, table=True):
    """``state`` is queued, running, done, failed or cancelled; ``progress`` 0 to 1 with ``step`` in words.

    ``kind`` is compile, or measure: then ``manifest`` is what is to be measured, ``parent`` the job that wishes it, ``report`` what came
    of it. ``lease`` is held by ``worker`` (empty: the controller's own) until ``lease_until``; ``attempts`` counts leases.
    """

    __tablename__ = "compile_job"
    id: str = Field(primary_key=True)
    kind: str = "compile"
    parent: str = Field(default="", index=True)
    worker: str = ""
    lease: str = Field(default="", index=True)
    lease_until: float | None = None
    attempts: int = 0
    report: str = Field(default="", sa_type=Text)  # JSON: AcceptanceReport
    log: str = Field(default="", sa_type=Text)
    model: str
    version: str
    device_class: str = Field(foreign_key="device_class.name")
    ship_despite_quality: bool = False
    state: str = Field(index=True)
    step: str = ""
    progress: float = 0.0
    manifest: str = ""
    error: str = Field(default="", sa_type=Text)  # JSON: EdgefleetError.as_dict
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None


class JobFailure(SQLModel, table=True):
    """How a job ended on a worker (empty: the controller's own) by that machine's fault; its last time there. ``silent``: the worker was
    not heard of any more, and may have been started again since."""

    __tablename__ = "job_failure"
    job: str = Field(foreign_key="compile_job.id", primary_key=True)
    worker: str = Field(primary_key=True)
    silent: bool = False
    error: str = Field(sa_type=Text)  # JSON: EdgefleetError.as_dict
    at: float


class RolloutRow(SQLModel, table=True):
    """A rollout. ``state`` is the engine's own memory of it (JSON); ``revision`` rises with each change, so that of two
    controllers that decided upon the same state only one is heard. The ``intent`` columns are the operator's to write."""

    __tablename__ = "rollout"
    name: str = Field(primary_key=True)
    model: str
    version: str
    spec: str = Field(sa_type=Text)
    artifacts: str = Field(sa_type=Text)
    phase: str = Field(index=True)
    reason: str = Field(default="", sa_type=Text)
    state: str = Field(sa_type=Text)
    revision: int = 0
    intent: str = "none"
    intent_number: int = 0
    intent_seen: int = 0
    intent_by: str = ""
    created_at: float
    ended_at: float | None = None


class RolloutBoard(SQLModel, table=True):
    """A selected board in a rollout; ``progress`` is JSON."""

    __tablename__ = "rollout_board"
    rollout: str = Field(foreign_key="rollout.name", primary_key=True)
    device: str = Field(primary_key=True, index=True)
    standing: str
    progress: str = Field(sa_type=Text)


class Assignment(SQLModel, table=True):
    """A signed assignment: the bytes that go to the board verbatim. ``published`` once the broker took them; ``subject`` is what it
    is about, model or agent."""

    __tablename__ = "assignment"
    __table_args__ = (UniqueConstraint("device", "version"),)
    id: str = Field(primary_key=True)
    device: str = Field(foreign_key="device.name", index=True)
    version: int
    manifest: str
    rollout: str = Field(default="", index=True)
    payload: bytes = Field(sa_type=LargeBinary)
    payload_digest: str
    created_at: float
    published: bool = Field(default=False, index=True)
    subject: str = "model"


class EventRow(SQLModel, table=True):
    """One event, once. ``body`` is the message's tagged body (JSON); ``at`` the board's clock, ``received_at`` ours."""

    __tablename__ = "event"
    device: str = Field(primary_key=True)
    boot: str = Field(primary_key=True)
    sequence: int = Field(primary_key=True, sa_type=BigInteger)
    kind: str
    at: float
    received_at: float = Field(index=True)
    body: str = Field(sa_type=Text)


class EventFloor(SQLModel, table=True):
    """Up to where a board's events are stored without a gap (``contiguous``), and the highest that is stored at all."""

    __tablename__ = "event_floor"
    device: str = Field(primary_key=True)
    boot: str = Field(primary_key=True)
    contiguous: int = Field(sa_type=BigInteger)
    highest: int = Field(sa_type=BigInteger)
