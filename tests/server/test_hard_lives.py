"""Clients that leave at any moment or stop reading, and an engine that dies."""

from __future__ import annotations

import asyncio
import heapq
import json
import math
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import httpx
import pytest
import uvicorn
from microvllm.engine.outputs import RequestOutput
from microvllm.engine.server import chat, completions, events, patience
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from ..stalls import Stalls
from .small_server import SmallServer, send, serving

ROUTES = {
    "/v1/completions": {"prompt": ["hello", "a" * 60], "n": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/generate": {"prompt": "once upon a time"},
    "/generate_stream": {"prompt": "once upon a time"},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
def test_a_client_that_leaves_frees_its_blocks_within_a_step(make_engine, path, stream):
    engine = make_engine(max_prefill_tokens=16)
    with serving(engine) as server:
        server.slow_down(0.02)
        taken = [] if path.startswith("/generate") else ["stream"]
        options = {"max_tokens": 60, "ignore_eos": True} | dict.fromkeys(taken, stream)
        for steps in (0, 1, 3, 8):  # before, during and after its prefill, in mid-stream
            connection = server.connect(path, ROUTES[path] | options)
            server.wait(lambda: server.running._open)
            time.sleep(0.022 * steps)
            assert server.running._open
            connection.close()
            server.assert_comes_to_rest(0.5)  # to their ends they would take a second
        server.assert_serves()


@pytest.mark.parametrize("part", [0.0, 0.1, 0.9], ids=["nothing", "in the head", "in the body"])
@pytest.mark.parametrize("drips", [False, True])
def test_a_request_that_does_not_arrive_is_waited_for_so_long_and_no_longer(make_engine, monkeypatch, part, drips):
    monkeypatch.setattr(patience, "SECONDS", 0.4)
    with serving(make_engine()) as server:
        start = time.monotonic()
        with server.connect("/generate", {"prompt": "a" * 200, "max_tokens": 3}, part) as connection:
            connection.settimeout(0.05)
            ended = False
            while not ended and time.monotonic() < start + 3:
                try:
                    if drips and part:
                        connection.sendall(b"a")
                    ended = connection.recv(100) == b""
                except TimeoutError:
                    server.assert_serves()
                except ConnectionError:
                    ended = True
        assert ended and time.monotonic() - start > 0.35


def test_an_answer_may_take_longer_than_its_request_may(make_engine, monkeypatch):
    monkeypatch.setattr(patience, "SECONDS", 0.2)
    with serving(make_engine()) as server:
        server.slow_down(0.05)
        for _ in range(2):  # on one connection
            answer = server.post("/generate", {"prompt": "hello", "max_tokens": 10, "ignore_eos": True})
            assert len(answer.json()["token_ids"]) == 10
        assert answer.elapsed.total_seconds() > 0.3


def test_a_request_that_comes_with_another_is_waited_for_no_longer(make_engine, monkeypatch):
    """uvicorn has its beginning before the other is answered, and nothing comes after that."""
    monkeypatch.setattr(patience, "SECONDS", 0.4)
    with serving(make_engine()) as server:
        start = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.port), timeout=3) as connection:
            connection.sendall(
                b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
                b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
            )
            received = b""
            while data := connection.recv(1000):
                received += data
        assert received.startswith(b"HTTP/1.1 200") and time.monotonic() - start > 0.35
        server.assert_serves()


def test_an_answer_that_is_not_read_is_kept_so_long_and_no_longer(make_engine, monkeypatch):
    monkeypatch.setattr(patience, "SECONDS", 0.4)
    with serving(make_engine()) as server:
        start = time.monotonic()
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=3)
        with connection, pytest.raises(ConnectionError):
            while True:  # until uvicorn reads no more, and then until it is gone
                connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
        assert time.monotonic() - start > 0.35
        server.assert_serves()


def test_an_answer_that_is_read_slowly_is_kept_as_long_as_it_is_read(monkeypatch):
    """On a transport whose full buffer holds less at each look, until one finds as much as the look before."""
    monkeypatch.setattr(patience, "SECONDS", 0.01)
    left = iter([900, 600, 600, 300, 300, 300])  # when writing pauses; then at each look, and to compare the next with

    async def serve_one():
        protocol = patience.PatientProtocol(uvicorn.Config(asgi_without_routes, lifespan="off"), ServerState(), {})
        aborted = asyncio.Event()
        protocol.transport = Mock(get_write_buffer_size=lambda: next(left), abort=aborted.set)
        protocol.flow = FlowControl(protocol.transport)
        protocol.pause_writing()
        await asyncio.wait_for(aborted.wait(), 10)

    async def asgi_without_routes(scope, receive, send):
        """Never called: no request is parsed."""

    asyncio.run(serve_one())
    assert next(left, None) is None


def test_a_thousand_clients_that_leave_at_random_moments(make_engine):
    """Under load, some in the middle of their own request; then every block is free and a canary is served."""
    rng = random.Random(7)
    engine = make_engine(num_blocks=64, max_prefill_tokens=16, max_batch_size=12)
    with serving(engine) as server:
        server.slow_down(0.001)
        ended, listener = Counter(), server.running._listener

        def listen(now, events):
            ended.update(phase(event.output) for *_, event in events if event.output is not None)
            listener(now, events)

        server.running._listener = listen
        stayed, left = [], threading.Event()

        def stay():
            body = {"prompt": "hello", "max_tokens": 40, "ignore_eos": True}
            while not left.is_set():
                answer = httpx.post(f"http://127.0.0.1:{server.port}/generate", json=body, timeout=60)
                stayed.append((answer.status_code, len(answer.json()["token_ids"])))

        staying = threading.Thread(target=stay)
        staying.start()
        leaving: list[tuple[float, socket.socket]] = []
        for _ in range(1000):
            path = rng.choice(list(ROUTES))
            body = ROUTES[path] | {"max_tokens": rng.choice([2, 60]), "ignore_eos": True}
            if path.startswith("/v1"):
                body["stream"] = rng.random() < 0.5
            if rng.random() < 0.1:
                connection = server.connect(path, body, part=rng.random())
            else:
                connection = server.connect(path, body)
            heapq.heappush(leaving, (time.monotonic() + rng.choice([0.01, 0.1, 0.5]) * rng.random(), connection))
            while len(leaving) > 10 or (leaving and leaving[0][0] <= time.monotonic()):
                due, connection = heapq.heappop(leaving)
                time.sleep(max(0.0, due - time.monotonic()))
                connection.close()
        for _, connection in leaving:
            connection.close()
        left.set()
        staying.join()
        server.assert_comes_to_rest(20)
        assert stayed and set(stayed) == {(200, 40)}
        assert min(ended[each] for each in ("before its prefill", "during its prefill", "in mid-stream")) > 10, ended
        server.assert_serves()


def phase(output: RequestOutput) -> str:
    """Where a request was when it ended."""
    if output.finish_reason != "abort":
        return "at its end"
    if output.timings.to_first_step is None:
        return "before its prefill"
    return "during its prefill" if output.timings.to_first_token is None else "in mid-stream"


def test_a_body_that_never_ends_takes_nothing(make_engine):
    with serving(make_engine()) as server:
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        server.assert_serves()
        connection.close()
        server.assert_serves()
        server.assert_comes_to_rest()


def test_a_client_that_does_not_read_costs_only_itself(make_engine):
    """Sixty of them, with receive buffers that fill at once; the others' answers come as if they were not there."""
    with serving(make_engine(max_batch_size=64, num_blocks=1024)) as server:
        unread = [small_window(server) for _ in range(60)]
        for _ in range(3):
            server.assert_serves()
        server.assert_comes_to_rest(30)  # the engine has finished them all
        received = read_to_the_end(unread[0])  # who reads at last has lost nothing
        assert received.count(b"data: {") == 120 and b"data: [DONE]" in received
        for connection in unread:
            connection.close()


def small_window(server: SmallServer, n: int = 1) -> socket.socket:
    """A connection whose receive buffer is soon full, on which 120 · n events of 1.5 kB have been asked for."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.connect(("127.0.0.1", server.port))
    connection.settimeout(10)
    body = {"prompt": "a", "max_tokens": 120, "ignore_eos": True, "logprobs": 20, "stream": True, "n": n}
    send(connection, "/v1/completions", body)
    return connection


def read_to_the_end(connection: socket.socket, size: int = 1 << 16, rate: float = math.inf) -> bytes:
    """rate: bytes a second on the whole, so that a pause of this process is made up for"""
    start, received = time.monotonic(), b""
    while not received.endswith(b"0\r\n\r\n") and (data := connection.recv(size)):
        received += data
        time.sleep(max(0.0, start + len(received) / rate - time.monotonic()))
    return received


def test_a_client_that_reads_byte_by_byte_is_cut_off_and_the_others_are_not_held_up(make_engine, monkeypatch):
    monkeypatch.setattr(events, "STALL_SECONDS", 0.5)
    with serving(make_engine(max_batch_size=16, num_blocks=256)) as server:
        slow = [small_window(server) for _ in range(6)]
        received, stop = [b""] * len(slow), threading.Event()

        def read_bytes():
            while not stop.wait(0.02):
                for i, connection in enumerate(slow):
                    received[i] += connection.recv(1)

        reading = threading.Thread(target=read_bytes, daemon=True)
        reading.start()
        for _ in range(3):  # while they read their first hundred bytes
            answer = server.post(
                "/v1/completions", {"prompt": "b", "max_tokens": 100, "ignore_eos": True, "stream": True}
            )
            assert answer.text.count("data: {") == 100 and answer.text.endswith("data: [DONE]\n\n")
        server.assert_comes_to_rest()  # the engine has long forgotten them
        server.wait(lambda: not server.responding(), 20)
        stop.set()
        reading.join()
        for start, connection in zip(received, slow, strict=True):
            whole = start + read_to_the_end(connection)  # what was on its way already
            assert whole.startswith(b"HTTP/1.1 200") and whole.count(b"data: {") < 120 and b"[DONE]" not in whole
        server.assert_serves()


def test_a_client_that_reads_steadily_is_not_cut_off(make_engine, monkeypatch):
    """It takes over two seconds, and a third of one empties what uvicorn keeps."""
    monkeypatch.setattr(events, "STALL_SECONDS", 1.0)
    with serving(make_engine()) as server:
        received = read_to_the_end(small_window(server, n=4), 2048, rate=150_000)
        assert len(received) > 2 * 150_000
        assert received.count(b"data: {") == 480 and b"data: [DONE]" in received


def test_the_event_loop_waits_for_nobody(make_engine):
    """Neither for a step nor for a prompt to be encoded, whatever the route."""
    engine = make_engine()
    encode = engine.encode

    def slow_encode(*arguments, **options):
        time.sleep(0.3)
        return encode(*arguments, **options)

    engine.encode = slow_encode
    with serving(engine) as server, ThreadPoolExecutor(len(ROUTES)) as pool:
        server.slow_down(0.3)
        stalls = Stalls()
        watching = asyncio.run_coroutine_threadsafe(stalls.watch(), server.running._loop)
        answers = [pool.submit(server.post, path, body | {"max_tokens": 2}) for path, body in ROUTES.items()]
        assert [answer.result().status_code for answer in answers] == [200] * len(ROUTES)
        assert server.post("/tokenize", {"prompt": "a"}).json()["count"] == 1
        watching.cancel()
        assert 0 < stalls.longest < 0.25


@pytest.mark.parametrize(
    "path, writer", [("/v1/completions", completions), ("/v1/chat/completions", chat)], ids=["text", "chat"]
)
def test_the_event_loop_does_not_write_log_probabilities(make_engine, monkeypatch, path, writer):
    """Those of many tokens take seconds."""
    threads = []
    write = writer._Answer.whole

    async def this_thread():
        return threading.current_thread()

    def watched(answer, outputs):
        threads.append(threading.current_thread())
        return write(answer, outputs)

    monkeypatch.setattr(writer._Answer, "whole", watched)
    with serving(make_engine()) as server:
        asked = {"logprobs": True, "top_logprobs": 3} if writer is chat else {"logprobs": 3}
        assert server.post(path, ROUTES[path] | asked | {"max_tokens": 2}).status_code == 200
        loop = asyncio.run_coroutine_threadsafe(this_thread(), server.running._loop).result()
    assert len(threads) == 1 and threads[0] is not loop


class TestDeath:
    """A step of the engine raises."""

    @pytest.fixture
    def dying(self, make_engine):
        """(server, die)"""
        engine = make_engine()
        step, dead = engine.step, threading.Event()

        def fail():
            time.sleep(0.01)
            if dead.is_set() and engine.has_work:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return step()

        engine.step = fail
        with serving(engine) as server:
            yield server, dead.set

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate_stream"])
    def test_an_open_stream_ends_with_an_error(self, dying, path):
        server, die = dying
        body = ROUTES[path] | {"max_tokens": 100, "ignore_eos": True}
        if path.startswith("/v1"):
            body["stream"] = True
        with server.client.stream("POST", path, json=body) as answer:
            lines = (line for line in answer.iter_lines() if line)
            first = next(lines)
            die()
            last = [first, *lines][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "engine_dead" and "illegal memory access" in error["message"]
        self.assert_is_dead(server)

    def test_all_that_is_open_ends_at_once(self, dying):
        server, die = dying
        with ThreadPoolExecutor(8) as pool:
            fields = {"max_tokens": 100, "ignore_eos": True}
            waiting = [pool.submit(server.post, path, body | fields) for path, body in ROUTES.items() for _ in range(2)]
            server.wait(lambda: server.running._open == 14)  # two of them are four requests each
            server.wait(lambda: server.engine.scheduler.running)
            die()
            before = time.monotonic()
            answers = [each.result() for each in waiting]
        assert time.monotonic() - before < 1
        for answer in answers:
            if answer.request.url.path == "/generate_stream":
                body = json.loads(answer.text.split("\n\n")[-2].removeprefix("data: "))
            else:
                assert answer.status_code == 503
                body = answer.json()
            assert (
                body["error"].keys() == {"message", "type", "param", "code"} and body["error"]["code"] == "engine_dead"
            )
        self.assert_is_dead(server)

    def test_an_answer_that_is_waited_for_is_a_503(self, dying):
        server, die = dying
        die()
        answer = server.post("/v1/completions", {"prompt": "hello"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        self.assert_is_dead(server)

    @staticmethod
    def assert_is_dead(server: SmallServer):
        assert server.client.get("/health").status_code == 503
        for path, body in ROUTES.items():
            answer = server.post(path, body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
        assert server.client.get("/metrics").status_code == 200


def test_a_request_whose_logits_are_no_numbers_fails_alone(make_engine):
    engine = make_engine()
    engine.runner.model.embedding.data[7] = float("nan")
    with serving(engine) as server:
        answer = server.post("/v1/completions", {"prompt": [7]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")
        events = server.post("/v1/completions", {"prompt": [[5], [7]], "stream": True, "max_tokens": 50}).text
        last = events.split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "generation_failed"
        server.assert_serves()
        server.assert_comes_to_rest()
