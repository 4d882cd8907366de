"""A real model from its GGUF file: the engine's greedy tokens are those of transformers, in float32."""

from __future__ import annotations

import pytest
import torch
from microvllm import InferenceEngine
from microvllm.engine.lab.forced import RecordingSampler
from microvllm.model.checkpoint import resolve
from transformers import AutoModelForCausalLM

from .parity import TOKENS, assert_like_transformers

PROMPTS = [
    "The three branches of the government of the United States are",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived",
    "Dear Mr. Smith,\n\nThank you for your letter of",
    "La capitale de la France est",
    "The history of the printing press begins",
    "In 1969, two astronauts",
    "A neural network is",
]


@pytest.fixture(scope="module")
def model():
    """ValueError with the command that installs it where it is missing: what this file proves must not be skipped."""
    path = resolve("smollm2")
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(model):
    engine = InferenceEngine("smollm2", device="cpu", num_blocks=64, block_size=16, progress=False)
    engine.runner.sampler = RecordingSampler(engine.kernels)
    return engine


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[-1:]], ids=["a batch of 8", "one alone"])
def test_64_greedy_tokens_are_transformers_own(model, engine, prompts):
    """One forward pass over prompt and tokens proves it: each token is the likeliest after those before it."""
    outputs = engine.generate([engine.tokenizer.encode(prompt) for prompt in prompts], max_tokens=TOKENS)
    assert_like_transformers(model, engine, outputs, distinct=20)
