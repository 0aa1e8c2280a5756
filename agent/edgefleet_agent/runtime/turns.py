"""Long work of the front: receives it as steps, between two of which all others have their turn, or whole, for a thread beside; hands on what comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import TypeVar

from edgefleet_shared.errors import StarvedError

_MadeT = TypeVar("_MadeT")


async def through(steps: Generator[None, None, _MadeT]) -> _MadeT:
    """What the work comes to. Raises whatever it raises."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            made: _MadeT = end.value
            return made
        await asyncio.sleep(0)


async def beside(work: Callable[[], _MadeT]) -> _MadeT:
    """What the work comes to, on a thread of its own.

    Raises:
        StarvedError: the board has no room for the thread.
        Whatever else the work raises.
    """
    begun = False

    def begin() -> _MadeT:
        nonlocal begun
        begun = True
        return work()

    try:
        return await asyncio.to_thread(begin)
    except RuntimeError as exc:
        if begun:
            raise
        raise StarvedError("the board has no room for another thread") from exc
