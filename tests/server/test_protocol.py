"""A body of megabytes that is wrong everywhere is refused for its first faults: to list all takes seconds."""

from __future__ import annotations

import pytest
from microvllm.engine.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, GenerateRequest
from pydantic import ValidationError

MANY = 20_000
FIELDS = {str(i): "x" for i in range(MANY)}
CHAT = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    "body, fields",
    [
        (CompletionRequest, {"prompt": [1.5] * MANY}),
        (CompletionRequest, {"prompt": [5, *[True] * MANY]}),
        (CompletionRequest, {"prompt": [[]] * MANY}),
        (CompletionRequest, {"prompt": "a", "stop": [5] * MANY}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": ["a"] * MANY}),
        (CompletionRequest, {"prompt": "a", "logit_bias": FIELDS}),
        (CompletionRequest, {"prompt": "a", "stream_options": FIELDS}),
        (CompletionRequest, {"prompt": "a"} | FIELDS),
        (GenerateRequest, {"prompts": [[]] * MANY}),
        (GenerateRequest, {"prompts": [["a"] * MANY]}),
        (ChatRequest, {"messages": ["a"] * MANY}),
        (ChatRequest, {"messages": [{}] * MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": [5] * MANY}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": [FIELDS]}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"} | FIELDS]}),
        (ChatRequest, CHAT | {"response_format": FIELDS}),
        (ChatRequest, CHAT | {"response_format": {"type": "json_object"} | FIELDS}),
        (ChatRequest, CHAT | {"response_format": {"type": "json_schema", "json_schema": FIELDS}}),
        (DetokenizeRequest, {"tokens": ["a"] * MANY}),
    ],
)
def test_few_faults_are_listed(body, fields):
    with pytest.raises(ValidationError) as wrong:
        body.model_validate(fields)
    assert wrong.value.error_count() <= 2
