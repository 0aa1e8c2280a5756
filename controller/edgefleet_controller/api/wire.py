"""The HTTP API's outermost layer: receives raw requests, hands on bounded ones, and counts the bytes of every answer.

A body is bounded before it is parsed, because a stranger's request is parsed before it is known to be one: what needs no operator
(enrolment) and what does look the same until then. Blobs are streamed and bounded where they are stored.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 16 * 1024 * 1024  # signed metadata of a large fleet, in base64


class Wire:
    """ASGI middleware.

    Args:
        count: is told the size of each piece of a body that goes out.
        streamed: whether this request's body is bounded by who reads it.
    """

    def __init__(self, app: ASGIApp, count: Callable[[int], None], streamed: Callable[[Scope], bool]) -> None:
        self._app, self._count, self._streamed = app, count, streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        came = 0

        async def bounded() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > MAX_BODY_BYTES and not self._streamed(scope):
                # The one exception that FastAPI lets through where it reads a body.
                raise HTTPException(413, f"a request may have {MAX_BODY_BYTES} bytes")
            return message

        async def counted(message: Message) -> None:
            self._count(len(message.get("body", b"")))
            await send(message)

        await self._app(scope, bounded, counted)
