"""Long work on the front's only thread: receives it as steps, hands on what comes of it; all others have their turn between two of them."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TypeVar

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
