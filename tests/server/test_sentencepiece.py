"""Texts by a SentencePiece tokenizer, which drops the space a text begins with. Of a text that goes on it stays."""

from __future__ import annotations

import pytest
from microvllm import InferenceEngine

from ..small_engine import TEMPLATE
from ..small_models import Shape, make_model
from ..test_tokenizer import sentencepiece
from .small_server import serving


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    make_model(Shape("llama"), folder)
    tokenizer = sentencepiece()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    with serving(InferenceEngine(folder, num_blocks=64, block_size=16, device="cpu", progress=False)) as server:
        yield server


@pytest.fixture(scope="module")
def options(server):
    """Every token drawn is " a"."""
    (token,) = (i for i in range(300) if server.engine.tokenizer.token_bytes(i) == b" a")
    return {"max_tokens": 3, "temperature": 0, "logit_bias": {str(token): 100}}


def test_a_text_goes_on_with_its_space(server, options):
    for prompt in ("a b", server.engine.tokenizer.encode("a b")):
        (choice,) = server.post("/v1/completions", options | {"prompt": prompt}).json()["choices"]
        assert choice["text"] == " a a a"
        (choice,) = server.post("/v1/completions", options | {"prompt": prompt, "echo": True}).json()["choices"]
        assert choice["text"] == "a b a a a"


def test_an_answer_to_a_chat_begins_without(server, options):
    messages = [{"role": "user", "content": "a b"}]
    (choice,) = server.post("/v1/chat/completions", options | {"messages": messages}).json()["choices"]
    assert choice["message"]["content"] == "a a a"


@pytest.mark.parametrize("echo", [False, True])
def test_its_tokens_stand_where_it_says(server, options, echo):
    body = options | {"prompt": "a b", "echo": echo, "logprobs": 0}
    (choice,) = server.post("/v1/completions", body).json()["choices"]
    shown = choice["logprobs"]
    for token, at in zip(shown["tokens"], shown["text_offset"], strict=True):
        assert choice["text"][at:].startswith(token if at or not echo else token.strip())
