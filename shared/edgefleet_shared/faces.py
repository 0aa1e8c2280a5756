"""What every command line does with an error that a user can act on. Receives a command, hands on one that ends in words.

Used by ``fleet``, ``fleet-agent`` and whatever comes after them, so that a script meets the same thing everywhere. Bugs of our own
keep their traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import msgspec

from edgefleet_shared.errors import EdgefleetError

F = TypeVar("F", bound=Callable[..., Any])


def told(command: F) -> F:
    """Message and hint on stderr, or with ``--json`` (option ``as_json``) one JSON object on stdout; a status of its own."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except EdgefleetError as exc:
            if options.get("as_json"):
                sys.stdout.write(msgspec.json.encode({"error": exc.as_dict()}).decode() + "\n")
            else:
                sys.stderr.write(f"error: {exc.message}\n" + (f"hint: {exc.hint}\n" if exc.hint else ""))
            sys.exit(exc.exit_status)

    return run  # type: ignore[return-value]
