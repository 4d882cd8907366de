"""What a request must pass before it is read: the key, and the size of its body."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import APIError
from .page_files import PAGE

MAX_BODY = 4 << 20
"""Bytes. 131072 token ids are 1 MB of JSON, and as much of the event loop's time as a body may take."""

TOO_LARGE = f"the body is larger than {MAX_BODY} bytes"


OPEN = frozenset({"/health", *PAGE})


class Guard:
    """Refuses with 401 who brings none of the keys, and with 413 who sends too much.

    No key is wanted by /health, nor by the page at / and its files: a browser that opens an address sends no header of
    ours, and these files are the same for everybody and say nothing of this server. The page asks for the key and sends
    it with all that it asks for. A key in a cookie or by HTTP's Basic scheme, which browsers do send by themselves,
    would be sent for any other site's page as well.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str] = ()):
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if scope["path"] not in OPEN and not self._may_enter(headers.get(b"authorization", b"")):
            return await APIError(401, "a valid API key is needed", code="invalid_api_key").response()(
                scope, receive, send
            )
        if not length.isdigit() or len(length) > 18 or int(length) > MAX_BODY:
            return await APIError(413, TOO_LARGE).response()(scope, receive, send)
        received = 0

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                raise HTTPException(413, TOO_LARGE)  # the one kind that FastAPI lets pass while it reads a body
            return message

        await self._app(scope, receive_some, send)

    def _may_enter(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        # Every key is compared, so that the time tells nothing of which was nearly right.
        matches = [hmac.compare_digest(key.strip(), own) for own in self._keys]
        return not self._keys or (scheme.lower() == b"bearer" and any(matches))
