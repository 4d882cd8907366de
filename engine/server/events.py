"""Answers that are watched over: they end when their client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from ..async_engine import DeadError, Stream
from .errors import APIError

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"

STALL_SECONDS = 60.0
"""What a client does not read is kept for it; one that has taken nothing for so long, twice at most, is cut off."""


class ClientLeft(Exception):
    """The client has closed its connection."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], *gone: Coroutine[Any, Any, None]) -> T:
    """The result of `work`, which is cancelled, and ClientLeft raised, when the client leaves; its body is read.

    gone: return when it is as good as gone
    """

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, *ends = map(asyncio.ensure_future, (work, leave(), *gone))
    try:
        await asyncio.wait((task, *ends), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for each in (task, *ends):
            each.cancel()
        await asyncio.gather(task, *ends, return_exceptions=True)


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
        self._offered = self._taken = 0  # messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_count(message: Message) -> None:
            self._offered += 1
            await send(message)  # waits while more than uvicorn keeps is on its way
            self._taken += 1

        try:
            await while_connected(receive, self._send(send_and_count), self._stall())
        except ClientLeft:
            pass
        finally:
            self._stream.close()

    async def _stall(self) -> None:
        """Returns when the client does not read."""
        taken = -1
        while self._taken == self._offered or self._taken != taken:
            taken = self._taken
            await asyncio.sleep(STALL_SECONDS)
        logging.getLogger("uvicorn.error").warning("A client does not read its events, and is cut off")

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
