"""What Triton has beside what is served here, and why it is not: the words of both faces. Pure."""

from __future__ import annotations

import re

LOADING = "the board's agent alone decides what is loaded"
CUDA = "no CUDA shared memory is served here; use system shared memory"
STREAMS = "streams are not served; a model that answers once is asked by ModelInfer"
TRACING = "there is no tracing here"
LOGGING = "there are no log settings here"

_PATHS = (
    (re.compile(r"/v2/repository/models/[^/]+/(load|unload)"), LOADING),
    (re.compile(r"/v2/(models/[^/]+/)?trace/setting"), TRACING),
    (re.compile(r"/v2/logging"), LOGGING),
)


def why(path: str) -> str:
    """Why nothing is served at a path of HTTP's; empty where Triton serves nothing there either."""
    return next((told for pattern, told in _PATHS if pattern.fullmatch(path)), "")
