"""The official `openai` client against a real process on SmolLM2: each field, with what the engine itself says."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path

import httpx
import openai
import pytest
from microvllm import InferenceEngine

from ..documents import marked
from .served_process import ServedProcess

README = Path(__file__).parents[2] / "README.md"
MODEL = "HuggingFaceTB/SmolLM2"
PROMPT = "The capital of France is"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]
FLAGS = ["--max-num-seqs", "16", "--max-model-len", "512", "--block-size", "16", "--quiet"]


@pytest.fixture(scope="module")
def server():
    server = ServedProcess("smollm2", "--served-model-name", MODEL, "--api-key", "sesame", *FLAGS)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def engine():
    """What the server must agree with."""
    return InferenceEngine("smollm2", num_blocks=64, block_size=16, max_model_len=512, progress=False)


@pytest.fixture
def complete(client):
    def complete(prompt=PROMPT, extra=None, **fields):
        """Greedy, six tokens, if not told otherwise; extra: the fields that are not OpenAI's"""
        fields = {"max_tokens": 6, "temperature": 0} | fields
        return client.completions.create(model=MODEL, prompt=prompt, extra_body=extra, **fields)

    return complete


@pytest.fixture
def chat(client):
    def chat(messages=CHAT, extra=None, **fields):
        fields = {"max_tokens": 6, "temperature": 0} | fields
        return client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra, **fields)

    return chat


class TestCompletions:
    def test_a_text(self, complete, engine):
        answer = complete()
        (expected,) = engine.generate(PROMPT, max_tokens=6)
        assert (answer.object, answer.model) == ("text_completion", MODEL) and answer.id.startswith("cmpl-")
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason, choice.logprobs) == (expected.text, "length", None)
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 6, 11)

    def test_sixteen_tokens_at_temperature_1_are_the_default(self, client):
        texts = {client.completions.create(model=MODEL, prompt=PROMPT).choices[0].text for _ in range(2)}
        assert len(texts) == 2
        assert client.completions.create(model=MODEL, prompt=PROMPT).usage.completion_tokens <= 16

    def test_token_ids_and_lists_of_either(self, complete, engine):
        ids, other = engine.tokenizer.encode(PROMPT), "Water boils at"
        texts = [output.text for output in engine.generate([PROMPT, other], max_tokens=6)]
        assert [choice.text for choice in complete(ids).choices] == texts[:1]
        for prompts in ([PROMPT, other], [ids, engine.tokenizer.encode(other)]):
            answer = complete(prompts)
            assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(texts))
            assert answer.usage.prompt_tokens == len(ids) + len(engine.tokenizer.encode(other))

    def test_n_answers_to_each_prompt_are_drawn_by_seed_and_place(self, complete, engine):
        answer = complete([PROMPT, "One"], n=3, seed=11, temperature=1.0)
        assert [choice.index for choice in answer.choices] == list(range(6))
        expected = [
            engine.generate(prompt, max_tokens=6, temperature=1.0, seed=11 + i)[0].text
            for prompt in (PROMPT, "One")
            for i in range(3)
        ]
        assert [choice.text for choice in answer.choices] == expected and len(set(expected[:3])) == 3
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 36)

    def test_a_seed_draws_the_same_again_and_none_draws_anew(self, complete):
        again = [complete(seed=5, temperature=1.0).choices[0].text for _ in range(2)]
        assert again[0] == again[1] != complete(seed=6, temperature=1.0).choices[0].text
        choices = complete(n=4, temperature=1.5).choices
        assert len({choice.text for choice in choices}) > 1

    @pytest.mark.parametrize(
        "fields, extra",
        [
            ({"temperature": 1.2, "top_p": 0.3, "seed": 1}, {}),
            ({"temperature": 1.2, "seed": 1}, {"top_k": 3}),
            ({"temperature": 1.2, "seed": 1}, {"top_k": -1}),
            ({"temperature": 1.2, "seed": 1}, {"min_p": 0.2}),
            ({"presence_penalty": 2.0}, {}),
            ({"frequency_penalty": 2.0}, {}),
            ({}, {"repetition_penalty": 1.5}),
            ({"logit_bias": {"7042": -100, "100": 1}}, {}),
        ],
    )
    def test_what_changes_the_draw_reaches_the_engine(self, complete, engine, fields, extra):
        options = {"max_tokens": 10, "temperature": 0} | fields | extra
        if options.get("top_k") == -1:
            options["top_k"] = 0
        if "logit_bias" in options:
            options["logit_bias"] = {7042: -100, 100: 1}
        expected = engine.generate(PROMPT, **options)[0].text
        assert complete(max_tokens=10, extra=extra, **fields).choices[0].text == expected
        plain = {name: options[name] for name in ("max_tokens", "temperature", "seed") if name in options}
        if options.get("top_k") != 0:
            assert expected != engine.generate(PROMPT, **plain)[0].text

    def test_stop_strings_end_the_text_and_are_not_shown(self, complete):
        for stop in (" Paris", ["\n\n", "never"]):
            (choice,) = complete(stop=stop, max_tokens=20).choices
            assert choice.finish_reason == "stop"
            assert choice.text == ("" if stop == " Paris" else " Paris.")

    def test_stop_tokens_min_tokens_and_ignore_eos(self, complete, engine):
        tokens = engine.generate(PROMPT, max_tokens=20)[0].token_ids
        stopped = complete(max_tokens=20, extra={"stop_token_ids": [tokens[2]]})
        assert (stopped.choices[0].finish_reason, stopped.usage.completion_tokens) == ("stop", 3)
        later = complete(max_tokens=20, extra={"stop_token_ids": [tokens[2]], "min_tokens": 8})
        assert later.usage.completion_tokens >= 8
        end = {"2": 100}  # <|im_end|>
        assert complete(logit_bias=end).usage.completion_tokens == 1
        assert complete(logit_bias=end).choices[0].finish_reason == "stop"
        going_on = complete(logit_bias=end, extra={"ignore_eos": True})
        assert (going_on.choices[0].finish_reason, going_on.usage.completion_tokens) == ("length", 6)

    def test_max_completion_tokens_overrides_and_user_is_taken(self, complete):
        assert complete(user="me", extra={"max_completion_tokens": 2}).usage.completion_tokens == 2

    def test_logprobs(self, complete, engine):
        (choice,) = complete(logprobs=3).choices
        (expected,) = engine.generate(PROMPT, max_tokens=6, logprobs=3)
        shown = choice.logprobs
        assert shown.tokens == [engine.tokenizer.decode([token]) for token in expected.token_ids]
        assert shown.token_logprobs == pytest.approx([entry.logprob for entry in expected.logprobs], abs=1e-3)
        for top, entry in zip(shown.top_logprobs, expected.logprobs, strict=True):
            assert top == pytest.approx({engine.tokenizer.decode([t]): p for t, p in entry.top}, abs=1e-3)
        for token, offset in zip(shown.tokens, shown.text_offset, strict=True):
            assert choice.text[offset:].startswith(token)

    def test_the_chosen_token_is_among_the_likeliest_and_a_special_one_has_its_name(self, complete):
        shown = complete(logprobs=0, logit_bias={"2": 100}).choices[0].logprobs
        assert shown.tokens == ["<|im_end|>"]
        assert shown.top_logprobs == [{"<|im_end|>": shown.token_logprobs[0]}]

    def test_bytes_of_half_a_character_are_told_apart(self, complete, engine):
        text = "été ✨🦜"
        ids = engine.tokenizer.encode(text)
        shown = complete(text, echo=True, logprobs=1, max_tokens=1).choices[0].logprobs
        assert any(token.startswith("bytes:\\x") for token in shown.tokens)
        assert len(shown.tokens) == len(ids) + 1 and shown.text_offset[len(ids)] == len(text)

    def test_the_name_of_a_special_token_counts_where_the_text_has_it(self, complete, engine):
        (end,) = engine.tokenizer.encode("<|im_end|>")
        text, ids = "Hi<|im_end|>you", engine.tokenizer.encode("Hi<|im_end|>you")
        assert ids[1] == end and len(ids) == 3
        (choice,) = complete(text, echo=True, logprobs=0, max_tokens=1).choices
        assert choice.logprobs.text_offset == [0, 2, 12, 15] and choice.text.startswith(text)
        (choice,) = complete(ids, echo=True, logprobs=0, max_tokens=1).choices
        assert choice.logprobs.text_offset == [0, 2, 2, 5] and choice.text.startswith("Hiyou")

    def test_bytes_that_are_no_characters_count_as_they_are_shown(self, complete, engine):
        token_of = {engine.tokenizer.token_bytes(token): token for token in range(engine.tokenizer.vocab_size)}
        lead, rest, a = token_of[b"\xc3"], token_of[b"\xa9"], token_of[b"a"]
        for ids, text, offsets in [
            ([rest, a, rest, rest, a], "\ufffda\ufffd\ufffda", [0, 1, 2, 3, 4]),
            ([a, lead, rest, a], "aéa", [0, 1, 1, 2]),
            ([lead, a, lead], "\ufffda\ufffd", [0, 1, 2]),
        ]:
            (choice,) = complete(ids, echo=True, logprobs=0, max_tokens=2, logit_bias={str(rest): 100}).choices
            assert choice.text == text + "\ufffd\ufffd"
            assert choice.logprobs.text_offset == [*offsets, len(text), len(text) + 1]

    def test_echo_with_logprobs_scores_the_prompt_as_lm_eval_needs(self, complete, engine):
        (choice,) = complete(echo=True, logprobs=1, max_tokens=1).choices
        (expected,) = engine.generate(PROMPT, max_tokens=1, logprobs=1, prompt_logprobs=1)
        assert choice.text == PROMPT + expected.text
        assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
        own = [entry.logprob for entry in expected.prompt_logprobs[1:] + expected.logprobs]
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(own, abs=1e-3)
        assert choice.logprobs.text_offset == [0, 3, 11, 14, 21, 24]

    def test_echo_alone_generates_nothing(self, complete, engine):
        answer = complete([PROMPT, "One"], echo=True, logprobs=1, max_tokens=0)
        assert [choice.text for choice in answer.choices] == [PROMPT, "One"]
        assert [len(choice.logprobs.tokens) for choice in answer.choices] == [5, 1]
        assert answer.usage.completion_tokens == 0
        ids = engine.tokenizer.encode(PROMPT)
        assert complete(ids, echo=True, max_tokens=0).choices[0].text == PROMPT
        (choice,) = complete(echo=True, max_tokens=0, logit_bias={"2": 100}).choices  # the end of the text
        assert (choice.text, choice.finish_reason) == (PROMPT, "length")

    def test_a_stream_is_one_event_a_token_and_joins_to_the_text(self, complete):
        whole = complete([PROMPT, "One"], n=2, logprobs=1).choices
        events = list(complete([PROMPT, "One"], n=2, logprobs=1, stream=True))
        assert len(events) == 24 and all(len(event.choices) == 1 and event.usage is None for event in events)
        assert len({event.id for event in events}) == 1
        for choice in whole:
            own = [event.choices[0] for event in events if event.choices[0].index == choice.index]
            assert "".join(each.text for each in own) == choice.text
            assert [each.finish_reason for each in own] == [None] * 5 + ["length"]
            assert [each.logprobs.tokens[0] for each in own] == choice.logprobs.tokens
            assert [each.logprobs.text_offset[0] for each in own] == choice.logprobs.text_offset

    def test_a_stream_may_echo_and_end_with_its_usage(self, complete):
        *events, last = complete(stream=True, echo=True, stream_options={"include_usage": True})
        assert "".join(event.choices[0].text for event in events) == PROMPT + complete().choices[0].text
        assert last.choices == [] and last.usage == complete().usage.model_copy(
            update={"prompt_tokens_details": last.usage.prompt_tokens_details}
        )


class TestChat:
    def test_a_conversation(self, chat, engine):
        answer = chat()
        (expected,) = engine.generate([CHAT], max_tokens=6)
        (choice,) = answer.choices
        assert (answer.object, choice.message.role, choice.message.content) == (
            "chat.completion",
            "assistant",
            expected.text,
        )
        assert choice.finish_reason == expected.finish_reason
        assert answer.usage.prompt_tokens == expected.usage.prompt_tokens

    def test_text_parts_and_developers_are_what_they_say(self, chat):
        parts = [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "type": "text",  # as lm-eval sends it
                "content": [{"type": "text", "text": "Name "}, {"type": "text", "text": "a colour."}],
            },
        ]
        assert chat(parts).choices[0].message.content == chat().choices[0].message.content

    def test_an_answer_can_be_sent_back_as_it_came(self, chat):
        message = chat().choices[0].message
        for answer in (message, message.model_dump() | {"parsed": {"name": "Paris"}}):
            assert chat([*CHAT, answer, {"role": "user", "content": "Another."}]).choices[0].message.content

    def test_without_a_limit_it_goes_on_to_its_end(self, client, engine):
        answer = client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0)
        (expected,) = engine.generate([CHAT], max_tokens=500)
        assert answer.choices[0].message.content == expected.text
        assert answer.choices[0].finish_reason == expected.finish_reason == "stop"

    def test_max_completion_tokens_n_stop_and_seed(self, chat, engine):
        answer = chat(n=2, seed=3, temperature=1.0, max_completion_tokens=4, max_tokens=None, stop=["zzz"], user="me")
        expected = [
            engine.generate([CHAT], max_tokens=4, temperature=1.0, seed=seed, stop="zzz")[0].text for seed in (3, 4)
        ]
        assert [choice.message.content for choice in answer.choices] == expected

    def test_logprobs(self, chat, engine):
        content = chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
        (expected,) = engine.generate([CHAT], max_tokens=6, logprobs=2)
        for shown, entry in zip(content, expected.logprobs, strict=True):
            assert shown.logprob == pytest.approx(entry.logprob, abs=1e-3)
            assert [top.logprob for top in shown.top_logprobs] == pytest.approx([p for _, p in entry.top], abs=1e-3)
            if engine.tokenizer.token_bytes(entry.token_id):
                assert bytes(shown.bytes) == engine.tokenizer.token_bytes(entry.token_id)
                assert shown.token == engine.tokenizer.decode([entry.token_id])
        assert all(each.top_logprobs == [] for each in chat(logprobs=True).choices[0].logprobs.content)

    def test_a_stream_begins_with_the_role_and_ends_with_the_usage(self, chat):
        whole = chat(n=2, logprobs=True)
        *events, last = chat(n=2, logprobs=True, stream=True, stream_options={"include_usage": True})
        for choice in whole.choices:
            first, *rest = [e.choices[0] for e in events if e.choices[0].index == choice.index]
            assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
            assert all(each.delta.role is None for each in rest) and len(rest) == whole.usage.completion_tokens // 2
            assert "".join(each.delta.content for each in rest) == choice.message.content
            assert [each.finish_reason for each in rest[:-1]] == [None] * (len(rest) - 1)
            assert rest[-1].finish_reason == choice.finish_reason
            tokens = [each.logprobs.content[0].token for each in rest]
            assert tokens == [each.token for each in choice.logprobs.content]
        assert (last.choices, last.usage.total_tokens) == ([], whole.usage.total_tokens)

    def test_a_stream_that_is_left_ends_its_request(self, chat, server):
        stream = chat(stream=True, max_tokens=400, extra={"ignore_eos": True})
        next(iter(stream))
        stream.close()
        headers = {"Authorization": "Bearer sesame"}
        for _ in range(50):
            text = httpx.get(f"{server.url}/metrics", headers=headers).text
            if "vllm:num_requests_running{" in text and value(text, "num_requests_running") == 0:
                break
        assert value(text, "num_requests_running") == value(text, "kv_cache_usage_perc") == 0


def value(metrics: str, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = [line for line in metrics.splitlines() if line.startswith(f"vllm:{name}{{")]
    assert lines, name
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


class TestErrors:
    def test_the_clients_own_exceptions(self, client, complete, server):
        with pytest.raises(openai.BadRequestError) as bad:
            complete(temperature=-1)
        assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
        with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
            complete(suffix="x")
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt-4", prompt="a")
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as other,
            pytest.raises(openai.AuthenticationError),
        ):
            other.models.list()

    def test_what_is_not_supported_is_named(self, chat):
        with pytest.raises(openai.BadRequestError) as bad:
            chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
        assert bad.value.param == "tools"

    def test_top_logprobs_without_logprobs(self, chat):
        with pytest.raises(openai.BadRequestError) as bad:
            chat(top_logprobs=2)
        assert bad.value.param == "top_logprobs"

    def test_logprobs_with_echo_are_not_streamed(self, complete):
        with pytest.raises(openai.BadRequestError, match="echo with logprobs"):
            complete(echo=True, logprobs=1, stream=True)


def test_the_readmes_example_runs(server, capsys):
    block = marked(README, "python server", "openai")
    here = {"http://127.0.0.1:8000": server.url, '"none"': '"sesame"', '"smollm2"': f'"{MODEL}"'}
    for there, ours in here.items():
        assert there in block
        block = block.replace(there, ours)
    exec(block, {})
    text, city = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert text.startswith(" Paris.") and re.fullmatch(r"name='.+' inhabitants=\d+", city)


def test_many_at_once_with_the_async_client(server, engine):
    prompts = [f"{i} and {i + 1} are" for i in range(12)]
    expected = [output.text for output in engine.generate(prompts, max_tokens=8)]

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="sesame") as client:

            async def one(i: int, prompt: str) -> str:
                fields = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0}
                if i % 2:
                    return (await client.completions.create(**fields)).choices[0].text
                stream = await client.completions.create(**fields, stream=True)
                return "".join([event.choices[0].text async for event in stream])

            chat = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=2, stream=True)
            texts = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
            return texts, [event.choices[0].delta.content async for event in await chat]

    texts, deltas = asyncio.run(main())
    assert texts == expected and len(deltas) == 3


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer sesame"}, timeout=60) as http:
        yield http


class TestOtherRoutes:
    def test_models(self, client):
        (card,) = client.models.list().data
        assert (card.id, card.max_model_len) == (MODEL, 512)
        assert client.models.retrieve(MODEL).id == MODEL

    def test_tokenize_and_back(self, http, engine):
        ids = engine.tokenizer.encode(PROMPT)
        answer = http.post("/tokenize", json={"prompt": PROMPT, "model": MODEL}).json()
        assert answer == {"count": len(ids), "max_model_len": 512, "tokens": ids}
        assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": PROMPT}
        chat = http.post("/tokenize", json={"messages": CHAT}).json()
        assert chat["tokens"] == engine.tokenizer.encode_chat(CHAT)
        spelt = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
        assert "<|im_start|>" in spelt and engine.tokenizer.encode(spelt) == chat["tokens"]
        special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": None}
        assert http.get("/tokenizer_info").json() == special
        plain = http.post("/tokenize", json={"prompt": PROMPT, "add_special_tokens": False}).json()
        assert plain["tokens"] == engine.tokenizer.encode(PROMPT, add_special_tokens=False)

    def test_generate_and_its_stream(self, http, engine):
        body = {"prompt": PROMPT, "max_tokens": 5}
        (expected,) = engine.generate(PROMPT, max_tokens=5)
        whole = http.post("/generate", json=body).json()
        assert (whole["text"], whole["token_ids"], whole["finish_reason"]) == (
            expected.text,
            expected.token_ids,
            "length",
        )
        answer = http.post("/generate_stream", json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, done, nothing = answer.text.split("\n\n")
        assert (done, nothing) == ("data: [DONE]", "")
        events = [json.loads(event.removeprefix("data: ")) for event in events]
        assert "".join(event["text"] for event in events) == expected.text
        assert [event["token_id"] for event in events[:-1]] == expected.token_ids[:-1]
        assert events[-1]["token_ids"] == expected.token_ids and events[-1]["usage"] == whole["usage"] | {
            "prompt_tokens_details": events[-1]["usage"]["prompt_tokens_details"]
        }

    def test_generate_with_several_prompts(self, http, engine):
        prompts = [PROMPT, engine.tokenizer.encode("Water boils at")]
        expected = engine.generate(prompts, max_tokens=5)
        answer = http.post("/generate", json={"prompts": prompts, "max_tokens": 5}).json()
        assert [result["text"] for result in answer["results"]] == [output.text for output in expected]
        assert [result["token_ids"] for result in answer["results"]] == [output.token_ids for output in expected]
        (one,) = http.post("/generate", json={"prompts": [PROMPT], "max_tokens": 5}).json()["results"]
        assert one["text"] == expected[0].text and one["usage"]["total_tokens"] == 10
        *events, done, _ = http.post("/generate_stream", json={"prompts": prompts, "max_tokens": 5}).text.split("\n\n")
        assert done == "data: [DONE]"
        events = [json.loads(event.removeprefix("data: ")) for event in events]
        for index, output in enumerate(expected):
            own = [event for event in events if event["index"] == index]
            assert "".join(event["text"] for event in own) == output.text
            assert own[-1]["token_ids"] == output.token_ids and own[-1]["finish_reason"] == "length"

    def test_generate_with_a_temperature_and_with_nulls(self, http, engine):
        body = {"prompt": PROMPT, "max_tokens": 100, "temperature": 0.7}
        answer = http.post("/generate", json=body).json()
        assert answer["finish_reason"] in ("length", "stop") and 0 < answer["usage"]["completion_tokens"] <= 100
        fields = http.get("/openapi.json").json()["components"]["schemas"]["GenerateRequest"]["properties"]
        nothing = dict.fromkeys(fields.keys() - {"prompt"}) | {"model": MODEL, "max_tokens": 5, "seed": None}
        assert http.post("/generate", json={"prompt": PROMPT} | nothing).json()["text"] == (
            engine.generate(PROMPT, max_tokens=5)[0].text
        )

    def test_version_docs_and_health(self, http, server):
        assert http.get("/version").json().keys() == {"version"}
        assert http.get("/docs").status_code == 200
        schema = http.get("/openapi.json").json()
        assert {"/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions"} <= schema["paths"].keys()
        assert {"prompt", "logit_bias", "max_tokens"} <= schema["components"]["schemas"]["GenerateRequest"][
            "properties"
        ].keys()
        assert httpx.get(f"{server.url}/health").status_code == 200

    def test_metrics_count_what_was_done(self, http, complete):
        before = http.get("/metrics").text
        prompt = "metrics " * 50
        for _ in range(2):
            complete(prompt, max_tokens=7, extra={"ignore_eos": True})
        after = http.get("/metrics").text

        def more(name: str) -> float:
            return value(after, name) - value(before, name)

        length = complete(prompt, max_tokens=1).usage.prompt_tokens
        assert more("prompt_tokens_total") == more("prefix_cache_queries_total") == 2 * length
        assert more("prefix_cache_hits_total") == (length - 1) // 16 * 16
        assert (more("generation_tokens_total"), more("request_success_total")) == (14, 2)
        assert (more("time_to_first_token_seconds_count"), more("inter_token_latency_seconds_count")) == (2, 12)
        assert (more("e2e_request_latency_seconds_count"), more("request_queue_time_seconds_count")) == (2, 2)
        spent = more("time_to_first_token_seconds_sum") + more("inter_token_latency_seconds_sum")
        assert math.isclose(spent, more("e2e_request_latency_seconds_sum"), rel_tol=1e-6)
        assert value(after, "num_requests_running") == value(after, "num_requests_waiting") == 0
        assert value(after, "num_preemptions_total") == 0
