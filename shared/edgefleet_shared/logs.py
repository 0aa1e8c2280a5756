"""Structured logs: one JSON object per line on stderr, with the ids that let an operator follow one deployment.

``event`` is the message itself: short, fixed words, never formatted, so that logs can be searched and counted. What varies stands in
fields: ``device``, ``rollout``, ``assignment``, ``digest``, ``reason`` and the like, given by ``extra=``.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import msgspec

from edgefleet_shared import streams
from edgefleet_shared.clock import iso

# What a LogRecord carries by itself; everything else came with ``extra=``.
# uvicorn's ``color_message`` is its message again, with the escape codes of a terminal.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """A record as one JSON line: at, level, event, where, then the ids and fields."""

    def __init__(self, ids: dict[str, str]) -> None:
        super().__init__()
        self._ids = ids

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": iso(record.created),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "where": record.name,
            **self._ids,
        }
        line |= {key: value for key, value in vars(record).items() if key not in _OWN}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def configure(level: str = "INFO", **ids: str) -> None:
    """Send this process's logs to stderr as JSON lines; see to it that there is one.

    Args:
        ids: fields that every line carries, such as ``device``.
    """
    streams.hold()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(ids))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
