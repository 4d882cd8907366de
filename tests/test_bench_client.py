"""The client of bench.serving against a server of server-sent events that keeps known times."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from microvllm.bench import client, servers
from microvllm.bench.client import Answer, Endpoint, Load, complete
from microvllm.bench.serving_metrics import metrics, time_per_output_token

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def token(text: str = "") -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text}]}).encode() + b"\n\n"


def end(tokens: int, done: bool = True) -> bytes:
    usage = {"prompt_tokens": 2, "completion_tokens": tokens, "total_tokens": 2 + tokens}
    return b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n" + b"data: [DONE]\n\n" * done


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class FakeServer:
    """Answers a request with what the test's coroutine writes, and keeps what it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.asked: list[dict] = []
        self.heads: list[str] = []
        self.running = self.most_running = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:-1])
        self.asked.append(json.loads(await reader.readexactly(int(fields.get("content-length", 0))) or "{}"))
        self.heads.append(head)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        await self.answer(self.asked[-1], writer)
        self.running -= 1
        writer.close()

    @contextmanager
    def serve(self) -> Iterator[str]:
        """→ its root. It runs in a thread, for the client has a loop of its own."""
        loop = asyncio.new_event_loop()
        server = loop.run_until_complete(asyncio.start_server(self.handle, "127.0.0.1", 0))
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


async def stream(asked: dict, writer: asyncio.StreamWriter, first: float = 0.0, gap: float = 0.0) -> None:
    """A token after `first` seconds, the others `gap` seconds apart."""
    writer.write(CHUNKED)
    for i in range(asked["max_tokens"]):
        await asyncio.sleep(gap if i else first)
        writer.write(chunk(token()))
    writer.write(chunk(end(asked["max_tokens"])) + b"0\r\n\r\n")
    await writer.drain()


def answers(answer, prompts=((1, 2),), tokens: int = 3, **load) -> list[Answer]:
    """Of requests to a server that answers so; they take 10 seconds at most."""
    with FakeServer(answer).serve() as url:
        return complete(Endpoint(url), "m", prompts, tokens, {}, Load(**{"timeout": 10.0} | load)).answers


def error_of(answer, **load) -> str | None:
    (answered,) = answers(answer, **load)
    return answered.error


def writes(*pieces: bytes):
    async def answer(asked: dict, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)

    return answer


class TestRequest:
    def test_what_is_asked(self):
        server = FakeServer(stream)
        with server.serve() as url:
            sampling = {"temperature": 0.7, "top_k": 50}
            complete(Endpoint(f"{url}/below/", "secret"), "m", [[1, 2], [3]], 3, sampling, Load(max_concurrency=1))
        fixed = {"model": "m", "max_tokens": 3, "ignore_eos": True, "stream": True}
        fixed |= {"stream_options": {"include_usage": True}, **sampling}
        assert server.asked == [{"prompt": [1, 2], **fixed}, {"prompt": [3], **fixed}]
        assert server.heads[0].startswith("POST /below/v1/completions HTTP/1.1\r\n")
        assert "Authorization: Bearer secret" in server.heads[0]

    def test_greedy_without_a_key(self):
        server = FakeServer(stream)
        with server.serve() as url:
            complete(Endpoint(url), "m", [[1]], 1, {}, Load())
        assert server.asked[0]["temperature"] == 0.0
        assert "Authorization" not in server.heads[0]

    @pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://"])
    def test_what_is_no_root_of_a_server(self, url):
        with pytest.raises(ValueError, match="is not the root of a server"):
            Endpoint(url)

    def test_place(self):
        assert Endpoint("https://example.org/v0").place == ("example.org", 443, True)
        assert Endpoint("http://[::1]:80").place == ("::1", 80, False)


class TestTimes:
    def test_of_tokens(self):
        (answer,) = answers(lambda asked, writer: stream(asked, writer, first=0.2, gap=0.05), tokens=4)
        assert answer.error is None
        # Never early, and as late as the machine makes it.
        assert all(0 <= time - least < 0.5 for time, least in zip(answer.tokens, (0.2, 0.25, 0.3, 0.35), strict=True))
        assert (answer.prompt_tokens, answer.output_tokens) == (2, 4)
        assert 0.04 < time_per_output_token(answer) < 0.2

    def test_events_in_one_piece_arrive_together(self):
        (answer,) = answers(writes(CHUNKED + chunk(token() * 2) + chunk(end(2)) + b"0\r\n\r\n"), tokens=2)
        assert answer.tokens[0] == answer.tokens[1]

    @pytest.mark.parametrize("size", [1, 7, 5000])
    def test_however_the_bytes_are_cut(self, size):
        body = token("x" * 9000) + b": a comment\n\nevent: message\n" + token().replace(b"\n", b"\r\n") + end(2)
        whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
        pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
        exchange = SimpleNamespace(pieces=pieces, times=[float(i) for i in range(len(pieces))], start=0.0, error=None)
        answer = client._answer(exchange, 0.0, 2, 2)
        assert answer.error is None
        first = whole.index(b"\n\n:")
        assert answer.tokens == [first // size, (whole.index(b"\r\n", first) + 1) // size]

    def test_several_tokens_an_event(self):
        (answer,) = answers(writes(CHUNKED, chunk(token()), chunk(token() + end(5)) + b"0\r\n\r\n"), tokens=5)
        assert answer.error is None
        assert (len(answer.tokens), answer.output_tokens) == (2, 5)
        assert time_per_output_token(answer) == (answer.tokens[1] - answer.tokens[0]) / 4

    def test_without_usage_events_are_counted(self):
        (answer,) = answers(writes(CHUNKED, chunk(token() * 2 + b"data: [DONE]\n\n") + b"0\r\n\r\n"), tokens=2)
        assert (answer.error, answer.prompt_tokens, answer.output_tokens) == (None, 2, 2)


class TestFailures:
    def test_a_status(self):
        body = b'{"error": {"message": "out of luck"}}'
        reply = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        assert error_of(writes(reply)) == f"HTTP 500: {body.decode()}"

    @pytest.mark.parametrize(
        "pieces, error",
        [
            ([CHUNKED, chunk(token())], "no [DONE] at the end"),
            ([CHUNKED, chunk(token())[:-9]], "the connection ended in mid-stream"),
            ([HEAD + b"\r\n", token()], "no [DONE] at the end"),
            ([HEAD + b"\r\n", token() * 3 + end(3, done=False)], "no [DONE] at the end"),
            ([HEAD + b"\r\n", token() * 2 + end(2)], "2 tokens instead of 3"),
            ([HEAD + b"\r\n", end(3)], "no event brought output"),
            ([HEAD + b"\r\n", b'data: {"error": "ill"}\n\n'], 'an error in the stream: {"error": "ill"}'),
            ([HEAD + b"\r\n", b"data: {\n\n"], "an event that is no completion: Expecting property name"),
            ([HEAD + b"\r\n", b"data: 5\n\n"], "an event that is no completion: 'int' object has no attribute"),
            ([b"nonsense\r\n\r\n"], "no HTTP response: nonsense"),
            ([], "no HTTP response: Remote end closed connection without response"),
        ],
    )
    def test_a_stream_that_is_not_whole(self, pieces, error):
        assert error_of(writes(*pieces)).startswith(error)

    def test_a_request_without_end(self):
        async def forever(asked, writer):
            writer.write(CHUNKED + chunk(token()))
            await asyncio.sleep(3)

        start = time.perf_counter()
        assert error_of(forever, timeout=0.3) == "no end within 0.3 s"
        assert time.perf_counter() - start < 2

    def test_no_server(self):
        url = f"http://127.0.0.1:{servers.free_port()}"
        (answer,) = complete(Endpoint(url), "m", [[1]], 3, {}, Load()).answers
        assert answer.error.startswith("no connection: ")

    def test_the_others_complete(self):
        async def second_fails(asked, writer):
            await (writes(HEAD + b"\r\n") if asked["prompt"] == [2] else stream)(asked, writer)

        found = answers(second_fails, prompts=[[1], [2], [3]])
        assert [answer.error for answer in found] == [None, "no [DONE] at the end", None]


class TestLoad:
    def test_at_once(self):
        assert Load().arrivals(3) == [0.0] * 3

    def test_poisson(self):
        load = Load(request_rate=50.0, seed=1)
        times = load.arrivals(2000)
        assert times == load.arrivals(2000) != Load(request_rate=50.0, seed=2).arrivals(2000)
        gaps = np.diff(times)
        assert times[-1] == pytest.approx(2000 / 50)
        assert gaps.min() > 0 and gaps.mean() == pytest.approx(1 / 50, rel=0.01)
        # Of an exponential distribution: the deviation is the mean, and one in e gaps is longer.
        assert gaps.std() == pytest.approx(1 / 50, rel=0.1)
        assert (gaps > 1 / 50).mean() == pytest.approx(1 / math.e, abs=0.04)

    def test_requests_arrive_when_they_should(self):
        server, load = FakeServer(lambda asked, writer: stream(asked, writer, first=0.3)), Load(request_rate=20.0)
        with server.serve() as url:
            found = complete(Endpoint(url), "m", [[1]] * 8, 2, {}, load).answers
        sent = [answer.start - found[0].start for answer in found]
        due = [arrival - load.arrivals(8)[0] for arrival in load.arrivals(8)]
        assert np.abs(np.subtract(sent, due)).max() < 0.2
        assert server.most_running > 2, "none waits for the one before"
        assert all(0 <= answer.queued < 0.2 for answer in found)

    def test_a_cap_on_concurrency(self):
        server = FakeServer(lambda asked, writer: stream(asked, writer, first=0.1))
        with server.serve() as url:
            run = complete(Endpoint(url), "m", [[1]] * 6, 2, {}, Load(max_concurrency=2))
        assert server.most_running == 2
        found = metrics(run, Load(max_concurrency=2))
        assert found["max_concurrent_requests"] == 2
        assert run.duration > 0.3 and 0 < run.cpu_share < 1
        waits = [answer.queued for answer in run.answers]
        assert waits[-1] > 0.2, "those that wait in the client do not wait for a token"
        assert found["p99_client_queue_time_ms"] > found["p99_ttft_ms"]

    @pytest.mark.parametrize(
        "options", [{"request_rate": 0}, {"request_rate": math.nan}, {"max_concurrency": 0}, {"timeout": math.inf}]
    )
    def test_what_makes_no_sense(self, options):
        with pytest.raises(ValueError):
            Load(**options)
