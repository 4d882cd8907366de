"""Answers that are watched over: they end when their client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from ..async_engine import DeadError, Stream
from .errors import APIError

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientLeft(Exception):
    """The client has closed its connection."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, and ClientLeft raised, when the client leaves; its body is read."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        task.cancel()
        left.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


def frame(data: BaseModel | dict[str, Any]) -> bytes:
    """A server-sent event."""
    text = data.model_dump_json(exclude_unset=True) if isinstance(data, BaseModel) else json.dumps(data)
    return f"data: {text}\n\n".encode()


class EventStream(Response):
    """Server-sent events, each as soon as it is made, from the stream that they are made of.

    A fault is an event as well, the last one. Whatever ends the answer closes the stream.
    """

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, events: AsyncIterator[bytes]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._stream, self._events = stream, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        except ClientLeft:
            pass
        finally:
            self._stream.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for piece in self._events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except DeadError as error:
            await send({"type": "http.response.body", "body": frame(APIError.of(error).body()), "more_body": True})
        except APIError as error:
            await send({"type": "http.response.body", "body": frame(error.body()), "more_body": True})
        await send({"type": "http.response.body", "body": b""})
