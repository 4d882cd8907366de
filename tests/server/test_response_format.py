"""Answers that follow a schema: the official `openai` client against a real process on SmolLM2."""

from __future__ import annotations

import asyncio
import json
from enum import Enum
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from microvllm import InferenceEngine
from microvllm.model.sampling_params import MAX_SCHEMA_LENGTH
from pydantic import BaseModel

from .served_process import ServedProcess

MODEL = "smollm2"
CHAT = [{"role": "user", "content": "Describe the city of Paris as JSON."}]
FLAGS = ["--max-num-seqs", "16", "--max-model-len", "512", "--block-size", "16", "--quiet"]
CITY = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Paris", "Rome", "Oslo"]},
        "place": {
            "type": "object",
            "properties": {"country": {"type": "string", "maxLength": 12}, "capital": {"type": "boolean"}},
            "required": ["country", "capital"],
            "additionalProperties": False,
        },
        "districts": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 20}, "maxItems": 4},
    },
    "required": ["name", "place", "districts"],
    "additionalProperties": False,
}


class Size(Enum):
    SMALL = "small"
    LARGE = "large"


class Place(BaseModel):
    country: str
    continent: str | None


class City(BaseModel):
    name: str
    size: Size
    place: Place


@pytest.fixture(scope="module")
def server():
    server = ServedProcess(MODEL, *FLAGS)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def chat(client):
    def chat(response_format: Any, **fields: Any):
        fields = {"max_tokens": 120, "temperature": 0} | fields
        return client.chat.completions.create(model=MODEL, messages=CHAT, response_format=response_format, **fields)

    return chat


@pytest.fixture(scope="module")
def engines():
    """In step with its device, and a step behind."""
    options = {"num_blocks": 64, "block_size": 16, "max_model_len": 512, "progress": False}
    return [InferenceEngine(MODEL, async_scheduling=behind, **options) for behind in (False, True)]


def named(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}


def valid(text: str, schema: dict = CITY) -> None:
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def test_a_schema(chat, engines):
    (choice,) = chat(named(CITY)).choices
    assert choice.finish_reason == "stop"
    valid(choice.message.content)
    for engine in engines:
        (expected,) = engine.generate([CHAT], json_schema=CITY, max_tokens=120)
        assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)


def test_several_answers_that_are_drawn(chat, engines):
    choices = chat(named(CITY), n=2, temperature=1.5, seed=3).choices
    assert [choice.finish_reason for choice in choices] == ["stop"] * 2
    for i, choice in enumerate(choices):
        valid(choice.message.content)
        (expected,) = engines[1].generate([CHAT], json_schema=CITY, max_tokens=120, temperature=1.5, seed=3 + i)
        assert choice.message.content == expected.text
    assert choices[0].message.content != choices[1].message.content


def test_any_json_object(chat, engines):
    tokenizer = engines[0].tokenizer
    # The end is made likely, which this small model finds late.
    likely = {str(t): 8 for t in range(tokenizer.vocab_size) if tokenizer.token_bytes(t).strip() in (b"}", b'"}')}
    choices = chat({"type": "json_object"}, n=4, temperature=1.0, seed=1, max_tokens=60, logit_bias=likely).choices
    ended = [choice for choice in choices if choice.finish_reason == "stop"]
    assert len(ended) >= 2 and len({choice.message.content for choice in ended}) > 1
    assert all(isinstance(json.loads(choice.message.content), dict) for choice in ended)


def test_text_is_what_no_format_is(chat):
    plain = chat(openai.NOT_GIVEN, max_tokens=4).choices
    assert chat({"type": "text"}, max_tokens=4).choices == chat(None, max_tokens=4).choices == plain


def test_the_clients_own_parsing(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=CHAT, response_format=City, max_tokens=200, temperature=0
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, City)


def test_a_stream(chat):
    (whole,) = chat(named(CITY), logprobs=True, top_logprobs=1).choices
    events = [event.choices[0] for event in chat(named(CITY), stream=True, logprobs=True, top_logprobs=1)]
    assert "".join(event.delta.content for event in events) == whole.message.content
    assert events[-1].finish_reason == "stop"
    tokens = [token for event in events if event.logprobs for token in event.logprobs.content]
    assert tokens == whole.logprobs.content and tokens[-1].token == "<|im_end|>"


def test_max_tokens_cuts_it_off(chat):
    answer = chat(named(CITY), max_tokens=5)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.choices[0].message.content)


def test_beside_a_stream_without_a_format(server):
    """All in one batch, and each as it is alone."""

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def free(prompt: str) -> list[str]:
                stream = await client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": prompt}],
                    max_tokens=20,
                    temperature=1.0,
                    seed=5,
                    stream=True,
                )
                return [event.choices[0].delta.content async for event in stream]

            async def city(seed: int) -> str:
                answer = await client.chat.completions.create(
                    model=MODEL, messages=CHAT, response_format=named(CITY), temperature=1.0, seed=seed
                )
                assert answer.choices[0].finish_reason == "stop"
                return answer.choices[0].message.content

            prompt = "What is a cat?"
            alone = await free(prompt)
            together, one, other = await asyncio.gather(free(prompt), city(1), city(2))
            assert (together, await city(1)) == (alone, one)
            return one, other

    one, other = asyncio.run(main())
    valid(one)
    valid(other)


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "a"}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": "x"}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "stricct": True}},
        {"type": "json_object", "schema": {}},
        [],
        "json_object",
        named({"type": "foo"}),
        named({"not": {"type": "string"}}),
        named({"$ref": "http://127.0.0.1:1/schema"}),
        named({"type": "string", "pattern": "("}),
        named({"enum": []}),
        named({"enum": ["\ud800"]}),
        named({"enum": ["x" * MAX_SCHEMA_LENGTH]}),
        named({"properties": 5}),
        # What shows only after some tokens.
        named({"type": "integer", "multipleOf": 99991, "minimum": 3, "maximum": 10**12}),
    ],
    ids=lambda value: json.dumps(value)[:70],
)
def test_what_cannot_be_followed_is_a_bad_request(server, response_format):
    body = {"messages": CHAT, "response_format": response_format, "max_tokens": 5}
    answer = httpx.post(  # json.dumps, because httpx would not send a lone surrogate
        f"{server.url}/v1/chat/completions",
        content=json.dumps(body),
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format"), answer.text
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_deep_schema_is_a_bad_request(server):
    deep = '{"items":' * 5000 + "{}" + "}" * 5000
    schema = f'{{"type":"json_schema","json_schema":{{"name":"a","schema":{deep}}}}}'
    body = f'{{"messages": {json.dumps(CHAT)}, "response_format": {schema}}}'
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_stream_ends_where_its_schema_becomes_too_complex(chat):
    schema = {"type": "integer", "multipleOf": 99991, "minimum": 3, "maximum": 10**12}
    with pytest.raises(openai.APIError, match="cannot be followed"):
        list(chat(named(schema), stream=True))


def test_a_schema_and_an_endless_answer_exclude_each_other(chat):
    with pytest.raises(openai.BadRequestError) as bad:
        chat(named(CITY), extra_body={"ignore_eos": True})
    assert bad.value.param == "ignore_eos"
