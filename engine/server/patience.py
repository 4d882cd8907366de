"""How long a request may take to arrive, and an answer to be taken."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 60.0
"""For all of a request, from the connection or the end of the answer before it on; and from one look at what is left in
uvicorn's full buffer to the next, which must find less. How long an answer takes to be made does not count.
"""


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 for clients that send a request byte by byte, or none, or do not read their answers: their
    connection is aborted at last, for an open one costs a file descriptor, of which a process has few. Merely closed,
    it would stay until all is read.
    """

    _arrival: asyncio.TimerHandle | None = None
    _departure: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def handle_events(self) -> None:
        super().handle_events()  # of what has just come, or of what came with the request before
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_departure()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._departure = _cancelled(self._departure)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._arrival, self._departure = _cancelled(self._arrival), _cancelled(self._departure)

    def _watch(self) -> None:
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._arrival = _cancelled(self._arrival)
        elif self._arrival is None:
            self._arrival = self.loop.call_later(SECONDS, self.transport.abort)

    def _await_departure(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._departure = self.loop.call_later(SECONDS, self._look_again, unread)

    def _look_again(self, unread: int) -> None:
        if self.transport.get_write_buffer_size() < unread:
            self._await_departure()
        else:
            self.transport.abort()


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
