"""An open-loop load client for OpenAI-compatible servers: requests arrive whether or not earlier ones are answered.

While a load runs, all that is done with what arrives is to note when it does. It is read as HTTP, as server-sent events
and as JSON when the load is over, so that the client is not what is measured.
"""

from __future__ import annotations

import asyncio
import gc
import http.client
import io
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

SHOWN = 200
"""Characters of an error's body in the reason why a request failed."""


@dataclass(frozen=True)
class Endpoint:
    """A server's root, and what every request to it says of who asks.

    url:      as http://127.0.0.1:8000; a path before the routes may follow
    api_key:  sent as a bearer token; None for a server without one
    """

    url: str
    api_key: str | None = None

    def __post_init__(self):
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"{self.url!r} is not the root of a server, as http://127.0.0.1:8000 is")

    @property
    def place(self) -> tuple[str, int, bool]:
        """(host, port, whether it is TLS)"""
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        return parts.hostname, parts.port or (443 if secure else 80), secure

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def _path(self, route: str) -> str:
        return urlsplit(self.url).path.rstrip("/") + route

    def get(self, route: str, timeout: float) -> tuple[int, bytes]:
        """The status and body of a GET, neither through a proxy nor after a redirect. OSError, HTTPException."""
        host, port, secure = self.place
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = connect(host, port, timeout=timeout)
        try:
            connection.request("GET", self._path(route), headers=self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, route: str, body: Mapping[str, Any]) -> bytes:
        """The bytes of a POST of JSON, after whose response the server closes the connection."""
        content = json.dumps(body).encode()
        host = urlsplit(self.url).netloc.rpartition("@")[2]
        headers = {"Host": host, "Content-Type": "application/json", "Content-Length": len(content)}
        headers |= {"Accept": "text/event-stream", "Connection": "close"} | self._headers
        lines = [f"POST {self._path(route)} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + content


@dataclass(frozen=True)
class Load:
    """When requests arrive.

    request_rate:     requests/s of a Poisson process; inf: all at once
    max_concurrency:  requests that are under way at once; the others wait in the client. None: no bound
    seed:             of the arrivals
    timeout:          seconds that a request may take before it has failed
    """

    request_rate: float = math.inf
    max_concurrency: int | None = None
    seed: int = 0
    timeout: float = 600.0

    def __post_init__(self):
        if not self.request_rate > 0:
            raise ValueError(f"a request rate is over 0, not {self.request_rate}")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ValueError(f"a concurrency is at least 1, not {self.max_concurrency}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"a timeout is a finite number of seconds over 0, not {self.timeout}")

    def arrivals(self, count: int) -> list[float]:
        """Seconds from the start to each of `count` arrivals.

        As `vllm bench serve` does, they are scaled to have the last at count / request_rate: seeds differ in where
        requests crowd, and not in how many a second there are.
        """
        if self.request_rate == math.inf:
            return [0.0] * count
        rng = random.Random(self.seed)
        times, now = [], 0.0
        for _ in range(count):
            now += rng.expovariate(1.0)
            times.append(now)
        return [moment / now * count / self.request_rate for moment in times]


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    start:          when it was sent, in seconds of time.perf_counter
    queued:         seconds from its arrival until then, which it spent in the client
    tokens:         seconds from `start` to the arrival of each event that brought output
    prompt_tokens, output_tokens:  as the server counts them; where it does not, those asked and the events
    error:          why it failed; None where it did not
    """

    start: float
    queued: float
    tokens: Sequence[float]
    prompt_tokens: int
    output_tokens: int
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """A load's answers, in the order of its requests.

    duration:   seconds from its start to the end of the last request
    cpu_share:  of that time, what this process computed
    """

    answers: list[Answer]
    duration: float
    cpu_share: float


class Exchange(asyncio.Protocol):
    """A request on a connection of its own, and what came back: `pieces`, each with the time of its arrival."""

    def __init__(self, request: bytes):
        self.request = request
        self.start = math.nan
        self.times: list[float] = []
        self.pieces: list[bytes] = []
        self.error: str | None = None
        self._ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.start = time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.times.append(time.perf_counter())
        self.pieces.append(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(error)

    async def run(self, endpoint: Endpoint, timeout: float) -> None:
        """Connects, sends, and returns when the server has closed the connection, or with an `error`."""
        host, port, secure = endpoint.place
        loop = asyncio.get_running_loop()
        try:
            await asyncio.wait_for(self._connect_and_wait(loop, host, port, secure), timeout)
        except asyncio.TimeoutError:
            self.error = f"no end within {timeout:g} s"
        except OSError as error:
            self.error = f"{'no connection' if math.isnan(self.start) else 'the connection broke'}: {error}"
        finally:
            if not math.isnan(self.start):
                self._transport.abort()

    async def _connect_and_wait(self, loop: asyncio.AbstractEventLoop, host: str, port: int, secure: bool) -> None:
        await loop.create_connection(lambda: self, host, port, ssl=secure or None)
        if error := await self._ended:
            raise error


class Replay(io.RawIOBase):
    """What arrived, to be read once more; `last` is the number of the piece that was read last."""

    def __init__(self, pieces: Sequence[bytes]):
        self._pieces, self._left = pieces, b""
        self.last = -1

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        if not self._left and self.last + 1 < len(self._pieces):
            self.last += 1
            self._left = self._pieces[self.last]
        part, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def makefile(self, mode: str) -> io.BufferedReader:
        """As of a socket, for http.client. It reads no piece before it has used up the one before."""
        return io.BufferedReader(self)


def complete(
    endpoint: Endpoint,
    model: str,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Mapping[str, float],
    load: Load,
) -> Run:
    """Streams a completion of exactly `tokens` tokens for each prompt of token ids, as OpenAI's API has it.

    ignore_eos and top_k are vLLM's additions to that API.
    """
    asked = {"model": model, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, **sampling}
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    requests = [endpoint.post("/v1/completions", {"prompt": list(prompt), **asked}) for prompt in prompts]
    exchanges, queued, duration, cpu_share = asyncio.run(_drive(endpoint, requests, load))
    lengths = [len(prompt) for prompt in prompts]
    answers = [_answer(*each, tokens) for each in zip(exchanges, queued, lengths, strict=True)]
    return Run(answers, duration, cpu_share)


async def _drive(
    endpoint: Endpoint, requests: Sequence[bytes], load: Load
) -> tuple[list[Exchange], list[float], float, float]:
    """→ exchanges; seconds that each waited in the client; duration in seconds; the share of it that we computed"""
    exchanges = [Exchange(request) for request in requests]
    slots = asyncio.Semaphore(load.max_concurrency or len(requests))

    async def send(exchange: Exchange, arrival: float) -> None:
        await asyncio.sleep(arrival - time.perf_counter())
        async with slots:
            await exchange.run(endpoint, load.timeout)

    gc.collect()
    gc.disable()  # a collection would be a gap between tokens that the server did not make
    try:
        start, computed = time.perf_counter(), time.process_time()
        arrivals = [start + seconds for seconds in load.arrivals(len(requests))]
        await asyncio.gather(*map(send, exchanges, arrivals))
        duration, computed = time.perf_counter() - start, time.process_time() - computed
    finally:
        gc.enable()
    queued = [exchange.start - arrival for exchange, arrival in zip(exchanges, arrivals, strict=True)]
    return exchanges, queued, duration, computed / duration


def _answer(exchange: Exchange, queued: float, prompt_tokens: int, asked: int) -> Answer:
    """What an exchange says; where it broke off, what arrived before."""
    tokens: list[float] = []
    usage: dict[str, Any] = {}
    try:
        finished = _read(exchange, tokens, usage)
        error = exchange.error or (None if finished else "no [DONE] at the end")
    except http.client.IncompleteRead:
        error = exchange.error or "the connection ended in mid-stream"
    except http.client.HTTPException as fault:
        error = exchange.error or f"no HTTP response: {fault}"
    except RuntimeError as fault:
        error = exchange.error or str(fault)
    except (ValueError, TypeError, AttributeError) as fault:  # no JSON, or JSON in another shape
        error = exchange.error or f"an event that is no completion: {fault}"
    if error is None and not tokens:
        error = "no event brought output"
    given = usage.get("completion_tokens") or len(tokens)
    if error is None and given != asked:
        error = f"{given} tokens instead of {asked}"
    return Answer(exchange.start, queued, tokens, usage.get("prompt_tokens") or prompt_tokens, given, error)


def _read(exchange: Exchange, tokens: list[float], usage: dict[str, Any]) -> bool:
    """Adds the times of output since the start to `tokens`, and the server's counts to `usage`.   → was there a [DONE]

    RuntimeError for what the server says is wrong; HTTPException, ValueError, TypeError, AttributeError for what is no
    HTTP or no completion.
    """
    replay = Replay(exchange.pieces)
    response = http.client.HTTPResponse(replay, method="POST")
    response.begin()
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status}: {response.read().decode(errors='replace').strip()[:SHOWN]}")
    while line := response.readline():
        field, _, value = line.partition(b":")
        if field != b"data":
            continue  # the blank line after an event, a comment that keeps the connection alive, a field we need not
        if (value := value.strip()) == b"[DONE]":
            return True
        event = json.loads(value)
        if event.get("error"):
            raise RuntimeError(f"an error in the stream: {value.decode(errors='replace')[:SHOWN]}")
        if event.get("choices"):
            tokens.append(exchange.times[replay.last] - exchange.start)
        usage |= event.get("usage") or {}
    return False
