"""Clients that leave at any moment or stop reading, and an engine that dies."""

from __future__ import annotations

import json
import random
import socket
import threading
import time

import httpx
import pytest

from .small_server import SmallServer, send, serving

pytestmark = pytest.mark.usefixtures("one_thread")

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
            while not server.running._open:
                time.sleep(0.001)
            time.sleep(0.022 * steps)
            assert server.running._open
            connection.close()
            server.assert_comes_to_rest(0.5)  # to their ends they would take a second
        server.assert_serves()


def test_hundreds_of_clients_that_leave_at_random_moments(make_engine):
    """Under load, some in the middle of their own request; then every block is free and a canary is served."""
    rng = random.Random(7)
    with serving(make_engine(num_blocks=64)) as server:
        stayed, end = [], time.monotonic() + 60

        def stay():
            body = {"prompt": "hello", "max_tokens": 40, "ignore_eos": True}
            while len(stayed) < 1000 and not left.is_set() and time.monotonic() < end:
                answer = httpx.post(f"http://127.0.0.1:{server.port}/generate", json=body, timeout=30)
                stayed.append((answer.status_code, len(answer.json()["token_ids"])))

        left = threading.Event()
        staying = threading.Thread(target=stay)
        staying.start()
        leaving: list[tuple[float, socket.socket]] = []
        for _ in range(400):
            path = rng.choice(list(ROUTES))
            body = ROUTES[path] | {"max_tokens": rng.choice([2, 60])}
            if path.startswith("/v1"):
                body["stream"] = rng.random() < 0.5
            connection = server.connect(path, body)
            leaving.append((time.monotonic() + rng.choice([0, 0.001, 0.01, 0.1]) * rng.random(), connection))
            for due in [pair for pair in leaving if pair[0] <= time.monotonic() or len(leaving) > 20]:
                due[1].close()
                leaving.remove(due)
        for _, connection in leaving:
            connection.close()
        left.set()
        staying.join()
        server.assert_comes_to_rest()
        assert stayed and set(stayed) == {(200, 40)}
        metrics = server.client.get("/metrics").text
        assert 'finished_reason="abort"' in metrics and "vllm:num_requests_running" in metrics
        server.assert_serves()


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
        unread = []
        for _ in range(60):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.connect(("127.0.0.1", server.port))
            body = {"prompt": "a", "max_tokens": 120, "ignore_eos": True, "logprobs": 20, "stream": True}
            send(connection, "/v1/completions", body)
            unread.append(connection)
        for _ in range(3):
            server.assert_serves()
        deadline = time.monotonic() + 30
        while server.running._open and time.monotonic() < deadline:
            time.sleep(0.01)
        server.assert_comes_to_rest()  # the engine has finished them all
        received = b""
        unread[0].settimeout(10)
        while not received.endswith(b"0\r\n\r\n"):  # who reads at last has lost nothing
            received += unread[0].recv(4096)
        assert received.count(b"data: {") == 120 and b"data: [DONE]" in received
        for connection in unread:
            connection.close()


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
