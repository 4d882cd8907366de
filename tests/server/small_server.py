"""A real server on a real socket, in a thread of the tests, around a small random model that they can reach into."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from microvllm import InferenceEngine
from microvllm.engine.async_engine import AsyncEngine
from microvllm.engine.server.app import make_app
from microvllm.engine.server.patience import PatientProtocol

from ..small_engine import assert_at_rest


def send(connection: socket.socket, path: str, body: dict[str, Any], part: float = 1.0) -> None:
    """part: of the request, from its beginning"""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    request = head.encode() + data
    connection.sendall(request[: round(part * len(request))])


@dataclass
class SmallServer:
    engine: InferenceEngine
    app: FastAPI
    http: uvicorn.Server
    port: int
    client: httpx.Client = field(init=False)

    def __post_init__(self):
        self.running: AsyncEngine = self.app.state.engine
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def connect(self, path: str, body: dict[str, Any], part: float = 1.0) -> socket.socket:
        """A connection on which a request, or a part of it, has been sent."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        send(connection, path, body, part)
        return connection

    def responding(self) -> int:
        """Requests that are being answered."""
        return len(self.http.server_state.tasks)

    def slow_down(self, seconds: float) -> None:
        """Each step of the engine that has work takes so much longer."""
        step = self.engine.step

        def slow():
            if self.engine.has_work:
                time.sleep(seconds)
            return step()

        self.engine.step = slow

    def assert_serves(self) -> None:
        """The canary."""
        answer = self.post("/v1/completions", {"prompt": "hello", "max_tokens": 3, "ignore_eos": True})
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3

    def assert_comes_to_rest(self, seconds: float = 5) -> None:
        self.wait(lambda: not self.running._open, seconds)
        assert_at_rest(self.engine)

    @staticmethod
    def wait(condition: Callable[[], object], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s"
            time.sleep(0.001)


@contextmanager
def serving(engine: InferenceEngine, **options: Any) -> Iterator[SmallServer]:
    """options: of make_app"""
    app = make_app(engine, ["small", "other/name"], **options)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        # What a client does not read is soon felt here.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server = uvicorn.Server(
            uvicorn.Config(app, http=PatientProtocol, log_level="error", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        small = SmallServer(engine, app, server, listener.getsockname()[1])
        try:
            yield small
        finally:
            small.client.close()
            server.should_exit = True
            thread.join()
