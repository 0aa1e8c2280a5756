"""``assert_never`` for Python 3.10, where ``typing`` lacks it: a match that forgets a case fails in the type checker."""

from __future__ import annotations

from typing import NoReturn


def assert_never(value: NoReturn) -> NoReturn:
    """Never returns: the type checker proves that it is never reached."""
    raise AssertionError(f"a case was forgotten: {value!r}")
