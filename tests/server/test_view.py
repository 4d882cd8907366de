"""What the page at / is made of, without a browser: its files and what it is told of the engine."""

from __future__ import annotations

import base64
import re
import struct
import threading

import httpx
import pytest
from microvllm.engine.server.page_files import FOLDER, PAGE

from .small_server import serving


def block_states(view: dict) -> list[int]:
    data = base64.b64decode(view["blocks"], validate=True)
    return list(struct.unpack(f"<{len(data) // 2}H", data))


def test_every_file_of_the_page_is_served_as_it_is_without_a_key_and_under_a_strict_policy(make_engine):
    with serving(make_engine(), api_keys=["secret"]) as server:
        assert {file.name for file in FOLDER.iterdir()} == {file.name for file in PAGE.values()}
        for path, file in PAGE.items():
            answer = server.client.get(path)
            assert (answer.status_code, answer.content) == (200, file.read_bytes())
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-store"
        types = {path.rpartition(".")[2]: server.client.get(path).headers["content-type"] for path in PAGE}
        assert types == {
            "/": "text/html; charset=utf-8",
            "css": "text/css; charset=utf-8",
            "js": "text/javascript; charset=utf-8",
            "svg": "image/svg+xml; charset=utf-8",
        }


@pytest.mark.parametrize("file", PAGE.values(), ids=lambda file: file.name)
def test_no_file_names_another_host_or_makes_markup_of_text(file):
    text = file.read_text()
    assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org", "https://html.spec.whatwg.org"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\son\w+=|style=", text)


def test_the_view_is_the_engine_between_two_steps(make_engine):
    engine = make_engine(max_batch_size=1)
    step, go = engine.step, threading.Semaphore(0)
    engine.step = lambda: (go.acquire(timeout=10) if engine.has_work else None, step())[1]
    with serving(engine) as server:
        idle = server.client.get("/view")
        assert idle.headers["cache-control"] == "no-store"
        assert (idle.json()["running"], idle.json()["waiting"], idle.json()["steps"]) == ([], [], 0)
        assert block_states(idle.json()) == [0] * 128
        body = {"prompt": "a" * 40, "max_tokens": 20, "ignore_eos": True}
        connections = [server.connect("/generate", body) for _ in range(3)]
        try:
            seen = []
            asking = threading.Thread(target=lambda: seen.append(server.client.get("/view").json()))
            server.wait(lambda: len(server.running._streams) == 3)
            for _ in range(4):
                go.release()
            server.wait(lambda: server.running.stats.steps >= 4)
            asking.start()
            while asking.is_alive():  # it comes with the end of a step
                go.release()
                asking.join(0.05)
            (view,) = seen
            (running,) = view["running"]
            assert (running["state"], running["prompt_tokens"], running["preemptions"]) == ("decode", 40, 0)
            assert running["generated_tokens"] == view["generated_tokens"] == view["steps"] >= 4
            assert view["clock"] > idle.json()["clock"] and view["prompt_tokens"] == 40
            assert view["num_waiting"] == len(view["waiting"]) == 2
            assert {(request["state"], request["blocks"]) for request in view["waiting"]} == {("waiting", 0)}
            states = block_states(view)
            assert states.count(3) == running["blocks"] == -(-(40 + running["generated_tokens"] - 1) // 16)
            assert set(states) == {0, 3} and len(states) == 128
        finally:
            for connection in connections:
                connection.close()
            for _ in range(100):
                go.release()
        server.assert_comes_to_rest()
        states = block_states(server.client.get("/view").json())
        assert set(states) == {0, 1} and states.count(1) >= 2  # the prompt's full blocks stay cached


def test_the_view_of_a_dead_engine_is_503(make_engine):
    engine = make_engine()
    with serving(engine) as server:
        engine.step = None
        with pytest.raises(httpx.HTTPStatusError):
            server.post("/generate", {"prompt": "a"}).raise_for_status()
        answer = server.client.get("/view")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
