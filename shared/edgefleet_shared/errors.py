"""The errors a user can act on.

::

    EdgefleetError                      code, message, hint (what to do next)
    ├── InputError                      something a person wrote or handed in is wrong
    │   ├── ManifestError               file, line, what was expected
    │   ├── ModelError                  the source network can't be used as it is
    │   └── DataError                   calibration, held-out or golden pictures
    ├── NotFoundError                   a named thing does not exist
    ├── ConflictError                   the request contradicts what already is
    ├── TrustError                      bytes or signatures that did not pass a check; carries the check's name
    ├── ArtifactError                   an artifact that is not what its digest or its layout says
    ├── IncompatibleError               a sound artifact that this board can't run
    ├── EngineError                     an inference engine refused, failed or died
    │   └── StarvedError                it had to go for what else is on the board; later it may have room
    ├── ToolchainError                  a compile toolchain failed
    │   └── ToolchainUnusable           it is missing or broken on this machine; another may have it
    ├── QualityError                    a compiled model misses a budget
    ├── TransportError                  broker, network or peer
    └── EnvironmentProblem              port taken, disk full, broker not installed, no rights

Foreign exceptions are translated at the adapter that meets them (``raise ... from exc``). Our own bugs are not in this tree.
``code`` is stable: programs may match on it. ``message`` says what is wrong, ``hint`` what to do next.
"""

from __future__ import annotations


class EdgefleetError(Exception):
    """Base of every error that a user can act on.

    Args:
        message: what is wrong, one sentence.
        hint: what to do next; may be empty.
    """

    code = "edgefleet_error"
    exit_status = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def as_dict(self) -> dict[str, str]:
        """The error as it goes over the HTTP API and out of ``--json``: code, message, hint."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class InputError(EdgefleetError):
    code = "bad_input"
    exit_status = 2


class ManifestError(InputError):
    code = "bad_manifest"


class ModelError(InputError):
    code = "bad_model"


class DataError(InputError):
    code = "bad_data"


class NotFoundError(EdgefleetError):
    code = "not_found"
    exit_status = 2


class ConflictError(EdgefleetError):
    code = "conflict"


class TrustError(EdgefleetError):
    """A check of the trust path failed; ``check`` names it (see :mod:`edgefleet_shared.trust`)."""

    code = "untrusted"

    def __init__(self, check: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"{check}: {message}", hint=hint)
        self.check = check


class ArtifactError(EdgefleetError):
    code = "bad_artifact"


class IncompatibleError(EdgefleetError):
    code = "incompatible"


class EngineError(EdgefleetError):
    code = "engine_failed"


class StarvedError(EngineError):
    code = "starved"


class ToolchainError(EdgefleetError):
    code = "toolchain_failed"


class ToolchainUnusable(ToolchainError):
    code = "toolchain_unusable"


class QualityError(EdgefleetError):
    """``report`` and ``page``: digests of what was tried, as JSON and as HTML, which tells how far each candidate was from the budgets; empty where
    nothing came to be tried."""

    code = "quality_missed"

    def __init__(self, message: str, *, hint: str = "", report: str = "", page: str = "") -> None:
        super().__init__(message, hint=hint)
        self.report, self.page = report, page

    @property
    def reports(self) -> tuple[str, ...]:
        """Both forms' digests; none where there is no report."""
        return (self.report, self.page) if self.report and self.page else ()

    def as_dict(self) -> dict[str, str]:
        return super().as_dict() | ({"report": self.report, "page": self.page} if self.reports else {})


class TransportError(EdgefleetError):
    code = "transport_failed"


class EnvironmentProblem(EdgefleetError):
    code = "environment"


def from_dict(fields: dict[str, str]) -> EdgefleetError:
    """Rebuild an error that crossed the HTTP API or a child process; an unknown code stays an :class:`EdgefleetError`."""
    code, message, hint = fields.get("code", ""), fields.get("message", "unknown error"), fields.get("hint", "")
    todo: list[type[EdgefleetError]] = [EdgefleetError]
    while todo:
        kind = todo.pop()
        if kind.code == code and kind is not EdgefleetError:
            if issubclass(kind, TrustError):
                check, _, rest = message.partition(": ")
                return kind(check, rest, hint=hint)
            if issubclass(kind, QualityError):
                return kind(message, hint=hint, report=fields.get("report", ""), page=fields.get("page", ""))
            return kind(message, hint=hint)
        todo.extend(kind.__subclasses__())
    return EdgefleetError(message, hint=hint)
