"""What a client can do wrong is told to it in OpenAI's shape, with the parameter's name, and harms nobody else."""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from microvllm.engine.server.guard import MAX_BODY

from ..small_models import MAX_LENGTH, VOCAB_SIZE
from .small_server import SmallServer, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
HI = [{"role": "user", "content": "hi"}]


def error(answer, status: int) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.json().keys() == {"error"}
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", "5"),
        ("max_tokens", 1.5),
        ("max_completion_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 10**30),
        ("min_p", 2),
        ("n", 0),
        ("n", 129),
        ("seed", 1 << 64),
        ("seed", "x"),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop", "a" * 257),
        ("stop", [1]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [VOCAB_SIZE]),
        ("stop_token_ids", [0] * 1025),
        ("min_tokens", 10**30),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-38),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": math.nan}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {str(VOCAB_SIZE): 1}),
        ("logit_bias", [1]),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),  # without stream
        ("stream_options", {"include": True}),
        ("user", 7),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "auto"),
        ("suffix", "x"),
        ("best_of", 2),
        ("response_format", {"type": "json"}),
        ("chat_template", "{{ messages }}"),
        ("temprature", 1),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_bad_or_unsupported_field_is_named(server, path, field, value):
    body = {"prompt": "hello"} if path == COMPLETIONS else {"messages": HI}
    answer = server.client.post(path, content=json.dumps(body | {field: value}), headers=JSON)
    assert error(answer, 400)["param"] == field


@pytest.mark.parametrize(
    "prompt",
    [
        None, "", [], [""], [[]], 5, True, {"a": 1}, [1.5], [True], ["a", 1], [[1], "a", [None]], [-1], [VOCAB_SIZE],
        [10**30], "a" * (MAX_LENGTH + 1), "a" * 10**6, [5] * MAX_LENGTH, ["a"] * 129, "\ud800", ["ok", "\udfff"],
    ],
)  # fmt: skip
def test_a_bad_prompt(server, prompt):
    answer = server.client.post(COMPLETIONS, content=json.dumps({"prompt": prompt}), headers=JSON)
    assert error(answer, 400)["param"] == "prompt"


BAD_MESSAGES = [
    [], "hi", [{"role": "user"}], [{"role": "user", "content": None}], [{"role": "king", "content": "hi"}],
    [{"role": "user", "content": "\ud800"}], [5],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost:1/x.png"}}]}],
    [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}],
]  # fmt: skip
FOR_CHAT = [None, [{"role": "user", "content": "a" * 200}]]  # a text to tokenize may be longer than the model's


@pytest.mark.parametrize(
    "path, messages",
    [(CHAT, each) for each in BAD_MESSAGES + FOR_CHAT] + [("/tokenize", each) for each in BAD_MESSAGES],
)
def test_bad_messages(server, path, messages):
    answer = server.client.post(path, content=json.dumps({"messages": messages}), headers=JSON)
    assert error(answer, 400)["param"] == "messages"


@pytest.mark.parametrize("content", [None, 5, [5], [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]])
def test_what_a_message_may_hold_is_said(server, content):
    answer = server.post(CHAT, {"messages": [{"role": "user", "content": content}]})
    assert error(answer, 400)["message"] == (
        'messages.0.content: must be a string or a list of text parts, {"type": "text", "text": "…"}, and of no others'
    )


@pytest.mark.parametrize("stop", [5, [5], {"a": 1}, ["a"] * 17, "a" * 257])
def test_what_may_end_a_text_is_said(server, stop):
    assert error(server.post(COMPLETIONS, {"prompt": "a", "stop": stop}), 400)["message"] == (
        "stop: must be a string or a list of strings, at most 16 of at most 256 characters"
    )


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "prompt"),
        ({"prompt": None, "prompts": None}, "prompt"),
        ({"prompt": "a", "prompts": ["a"]}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [VOCAB_SIZE]}, "prompt"),
        ({"prompts": []}, "prompts"),
        ({"prompts": "a"}, "prompts"),
        ({"prompts": ["a", ""]}, "prompts"),
        ({"prompts": ["a"] * 129}, "prompts"),
        ({"prompt": "a", "stream": True}, "stream"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "temprature": 1}, "temprature"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_what_generate_refuses_is_named(server, path, body, param):
    assert error(server.post(path, body), 400)["param"] == param


def test_whole_floats_are_integers_and_true_is_not(server):
    whole = server.post(COMPLETIONS, {"prompt": [5.0, 6], "max_tokens": 2.0, "n": 1.0, "stop_token_ids": [7.0]})
    assert whole.status_code == 200 and whole.json()["usage"]["prompt_tokens"] == 2
    for body, param in [
        ({"prompt": [5.5]}, "prompt"),
        ({"prompt": "a", "n": True}, "n"),
        ({"prompt": "a", "best_of": True}, "best_of"),
    ]:
        assert error(server.post(COMPLETIONS, body), 400)["param"] == param


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 10**30])
def test_a_token_outside_the_vocabulary_has_no_text(server, token):
    answer = error(server.post("/detokenize", {"tokens": [5, token]}), 400)
    assert answer["param"] == "tokens" and str(token) in answer["message"]


def test_a_limit_that_another_overrides_is_checked_all_the_same(server):
    body = {"messages": HI, "max_tokens": -1, "max_completion_tokens": 1}
    assert error(server.post(CHAT, body), 400)["param"] == "max_tokens"


def test_a_text_that_is_far_too_long_is_not_even_tokenized(server):
    assert server.post("/tokenize", {"prompt": "a" * 200}).json()["count"] == 200
    longest = MAX_LENGTH * max(len(token.encode()) for token in server.engine.tokenizer._fast.get_vocab())
    assert "is too long" in error(server.post("/tokenize", {"prompt": "a" * (longest + 1)}), 400)["message"]


@pytest.mark.parametrize("path, field", [(COMPLETIONS, "logprobs"), (CHAT, "top_logprobs")])
@pytest.mark.parametrize("count", [-1, 21, 10**30, "2"])
def test_a_bad_number_of_logprobs(server, path, field, count):
    body = {"prompt": "a"} if path == COMPLETIONS else {"messages": HI, "logprobs": True}
    assert error(server.post(path, body | {field: count}), 400)["param"] == field


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nonsense", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b'{"prompt": "a"', b'{"prompt": "\x00"}',
        b'{"prompt":' + b"[" * 10_000, b'{"prompt":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"prompt":' + b"[" * 900 + b"]" * 900 + b"}", b'{"x":' * 10_000,
        b'{"prompt": "a", "seed": ' + b"1" * 9000 + b"}",
        b'{"prompt": "a", "\\ud800": 1}', b'{"prompt": "a", "temperature": 1e999}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/generate", "/generate_stream", "/tokenize", "/detokenize"])
def test_a_malformed_body(server, path, body):
    error(server.client.post(path, content=body, headers=JSON), 400)


def test_a_body_that_does_not_say_it_is_json(server):
    answer = server.client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in error(answer, 400)["message"]


def test_null_is_absent(server):
    names = [
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "stop",
        "seed",
        "user",
    ]
    names += ["stream", "stream_options", "logprobs", "echo", "presence_penalty", "frequency_penalty", "logit_bias"]
    names += ["repetition_penalty", "ignore_eos", "min_tokens", "stop_token_ids", "suffix", "best_of", "model", "tools"]
    answer = server.post(COMPLETIONS, {"prompt": "hello"} | dict.fromkeys(names))
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 16
    names = [name for name in names if name != "echo"] + ["top_logprobs", "tool_choice", "response_format"]
    answer = server.post(CHAT, {"messages": HI} | dict.fromkeys(names))
    assert answer.status_code == 200 and answer.json()["usage"]["total_tokens"] == MAX_LENGTH


def test_values_that_ask_for_nothing_pass(server):
    neutral = {"best_of": 1, "suffix": "", "tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    body = {"prompt": "hello", "metadata": {"a": "b"}, "store": False, "top_k": -1, "max_tokens": 1}
    assert server.post(COMPLETIONS, body | neutral).status_code == 200


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/generate", "/tokenize", "/detokenize"])
def test_another_model_is_not_found(server, path):
    body = {"model": "gpt-4", "prompt": "a", "messages": HI, "tokens": [5]}
    kept = {CHAT: "messages", "/detokenize": "tokens"}.get(path, "prompt")
    answer = error(server.post(path, {"model": body["model"], kept: body[kept]}), 404)
    assert (answer["param"], answer["code"]) == ("model", "model_not_found")


def test_what_is_not_there(server):
    assert error(server.client.get("/v1/nothing"), 404)["type"] == "not_found_error"
    error(server.client.get("/v1/models/gpt-4"), 404)
    error(server.client.get(COMPLETIONS), 405)


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(server):
    def pieces():
        for _ in range(MAX_BODY // 2**20 + 1):
            yield b" " * 2**20

    error(server.client.post(COMPLETIONS, content=b" " * (MAX_BODY + 1), headers=JSON), 413)
    error(server.client.post(COMPLETIONS, content=pieces(), headers=JSON), 413)
    just = json.dumps({"prompt": "a"}).encode().ljust(MAX_BODY)
    assert server.client.post(COMPLETIONS, content=just, headers=JSON).status_code == 200


def test_headers_are_bounded(server):
    with contextlib.suppress(httpx.TransportError):  # the connection may be gone before the answer is read
        assert server.client.get("/health", headers={"X": "a" * 2_000_000}).status_code == 400
    server.assert_serves()


def test_garbage_is_survived(server):
    """Bodies made of every kind of value: no answer is a 5xx."""
    rng = random.Random(0)
    values = [
        None,
        True,
        0,
        -1,
        10**30,
        1.5,
        math.nan,
        "",
        "a",
        "\ud800",
        [],
        [[]],
        {},
        {"a": {}},
        ["a"] * 20,
        [5],
        "5",
    ]
    names = [
        "prompt",
        "messages",
        "temperature",
        "stop",
        "n",
        "stream",
        "logprobs",
        "top_logprobs",
        "echo",
    ]
    names += [
        "logit_bias",
        "seed",
        "min_tokens",
        "top_k",
        "top_p",
        "stop_token_ids",
        "stream_options",
        "tokens",
        "model",
    ]
    for _ in range(100):
        body = rng.choice([{}, {"prompt": "a"}, {"messages": HI}])
        body |= {name: rng.choice(values) for name in rng.sample(names, rng.randint(0, 4))}
        for path in (COMPLETIONS, CHAT, "/generate", "/tokenize", "/detokenize"):
            bound = {} if path.endswith("tokenize") else {"max_tokens": 2}
            answer = server.client.post(path, content=json.dumps(body | bound), headers=JSON)
            assert answer.status_code < 500, (path, body, answer.text)


@pytest.fixture(scope="module")
def guarded(make_engine):
    with serving(make_engine(), api_keys=["first", "second"]) as server:
        yield server


class TestKeys:
    @pytest.mark.parametrize(
        "header", [None, "Bearer", "Bearer firs", "Bearer firstx", "first", "Basic first", "Bearer é"]
    )
    def test_no_key_no_entry(self, guarded: SmallServer, header):
        headers = {} if header is None else {"Authorization": header.encode()}
        for method, path in [
            ("POST", COMPLETIONS),
            ("GET", "/metrics"),
            ("GET", "/docs"),
            ("GET", "/v1/models"),
            ("GET", "/view"),
            ("GET", "/page"),
            ("GET", "/page/"),
            ("GET", "/page/../view"),
            ("GET", "/page/guard.py"),
            ("GET", "/x"),
        ]:
            answer = guarded.client.request(method, path, headers=headers)
            assert error(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert guarded.client.get("/health", headers=headers).status_code == 200

    @pytest.mark.parametrize("key", ["first", "second"])
    def test_any_key_opens(self, guarded: SmallServer, key):
        headers = {"Authorization": f"Bearer {key}"}
        assert guarded.client.get("/v1/models", headers=headers).status_code == 200
        assert guarded.post(COMPLETIONS, {"prompt": "a"}, headers=headers).status_code == 200

    @pytest.mark.parametrize("key", ["x", "first", "second"])
    def test_every_key_is_compared_in_constant_time(self, guarded: SmallServer, monkeypatch, key):
        compared = []
        compare = hmac.compare_digest
        monkeypatch.setattr(hmac, "compare_digest", lambda one, own: compared.append((one, own)) or compare(one, own))
        guarded.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert compared == [(key.encode(), b"first"), (key.encode(), b"second")]


def test_overload_is_429_at_once_and_what_was_admitted_finishes(make_engine):
    engine = make_engine(max_batch_size=1)
    step, go = engine.step, threading.Event()
    engine.step = lambda: (go.wait(10) if engine.has_work else None, step())[1]
    with serving(engine, max_waiting=1) as server, ThreadPoolExecutor(2) as pool:
        body = {"prompt": "a", "max_tokens": 20, "ignore_eos": True}
        admitted = [pool.submit(server.post, "/generate", body) for _ in range(2)]
        server.wait(lambda: server.running._open == 2)
        answer = server.post("/generate", body)
        assert error(answer, 429)["type"] == "rate_limit_error" and answer.headers["retry-after"] == "1"
        assert server.client.get("/health").status_code == 200
        go.set()
        assert [len(future.result().json()["token_ids"]) for future in admitted] == [20, 20]
        assert error(server.post(COMPLETIONS, {"prompt": "a", "n": 3}), 400)["message"].startswith("3 requests at once")
        server.assert_serves()


def test_cors_is_off(server):
    answer = server.client.options(COMPLETIONS, headers={"Origin": "http://x", "Access-Control-Request-Method": "POST"})
    assert answer.status_code == 405 and not any("access-control" in name for name in answer.headers)


def test_cors_is_on_for_the_origins_that_were_asked_for(make_engine):
    with serving(make_engine(), allowed_origins=["http://x"], api_keys=["key"]) as server:
        for origin, allowed in (("http://x", "http://x"), ("http://y", None)):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            answer = server.client.options(
                COMPLETIONS, headers=asked | {"Access-Control-Request-Headers": "authorization"}
            )
            assert answer.headers.get("access-control-allow-origin") == allowed
            assert answer.status_code == (200 if allowed else 400)
            answer = server.post(
                COMPLETIONS, {"prompt": "a"}, headers={"Origin": origin, "Authorization": "Bearer key"}
            )
            assert answer.status_code == 200 and answer.headers.get("access-control-allow-origin") == allowed
