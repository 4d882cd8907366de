"""Qwen2.5-Coder-1.5B from its GGUF against transformers.   MICROVLLM_QWEN_CODER=file.gguf pytest tests/gpu"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from microvllm import InferenceEngine, KernelSet
from microvllm.engine.lab.forced import RecordingSampler
from transformers import AutoModelForCausalLM

from ..parity import forced_tokens
from ..small_models import transformers_logits

FILE = os.environ.get("MICROVLLM_QWEN_CODER")
pytestmark = pytest.mark.skipif(
    FILE is None, reason="MICROVLLM_QWEN_CODER names no qwen2.5-coder-1.5b-instruct GGUF file"
)

TOKENS = 64
PROMPTS = [
    "Write a Python function that reverses a linked list.",
    "Explain what a CUDA graph is.",
    "def fibonacci(n):",
    "What is the difference between a process and a thread?",
    "Translate to SQL: the ten customers with the highest total order value.",
    "Write a haiku about garbage collection.",
    "用中文解释什么是快速排序。",
    "Fix this code: for i in range(10) print(i)",
]


@pytest.fixture(scope="module")
def truth():
    """transformers' model in float32."""
    path = Path(FILE)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.to("cuda").eval()


def generate(dtype: str, kernels: KernelSet, **options) -> list[tuple[list[int], list[int], torch.Tensor]]:
    """(prompt ids, tokens, the logits they were chosen from) of each prompt, all in one batch."""
    engine = InferenceEngine(
        FILE, dtype=dtype, num_blocks=64, device="cuda", progress=False, kernels=kernels, **options
    )
    engine.runner.sampler = sampler = RecordingSampler(kernels)
    chats = [engine.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in PROMPTS]
    outputs = engine.generate(chats, max_tokens=TOKENS, ignore_eos=True)
    logits = [torch.stack([sampler.logits[o.request_id, i] for i in range(TOKENS)]) for o in outputs]
    return [(chat, o.token_ids, x) for chat, o, x in zip(chats, outputs, logits, strict=True)]


def logits_of(model, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    return transformers_logits(model, prompt + tokens)[len(prompt) - 1 : -1].float().cpu()


def test_greedy_tokens_in_float32_are_those_of_transformers(truth):
    seen = set()
    for prompt, tokens, logits in generate("float32", KernelSet.reference(), enforce_eager=True):
        expected = logits_of(truth, prompt, tokens)
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert tokens == expected.argmax(dim=-1).tolist()
        seen.update(tokens)
    assert len(seen) >= 100


def test_logits_in_bfloat16_are_as_right_as_those_of_transformers(truth):
    """Each is compared with transformers' float32 logits for the tokens that ours chose."""
    rounded = copy.deepcopy(truth)
    for weight in rounded.parameters():  # not rounded.bfloat16(), which would round the rotary frequencies too
        weight.data = weight.data.bfloat16()
    ours, theirs = [], []
    for prompt, tokens, logits in generate("bfloat16", KernelSet.default("cuda")):
        expected = logits_of(truth, prompt, tokens)
        ours.append(logits - expected)
        theirs.append(logits_of(rounded, prompt, tokens) - expected)

    def root_mean_square(errors: list[torch.Tensor]) -> float:
        return torch.cat(errors).square().mean().sqrt().item()

    print(f"root mean square error of bfloat16 logits: {root_mean_square(ours):.4f} and {root_mean_square(theirs):.4f}")
    assert root_mean_square(ours) <= 1.25 * root_mean_square(theirs)


def test_graphs_choose_the_tokens_of_the_eager_reference_when_each_is_fed_its_text():
    """At 99 % of the steps, with every token of a text put in the place of the one that was drawn."""
    prompts, texts, _ = zip(*generate("bfloat16", KernelSet.reference(), enforce_eager=True), strict=True)
    engine = InferenceEngine(FILE, dtype="bfloat16", num_blocks=64, device="cuda", progress=False)
    drawn = forced_tokens(engine, prompts, texts)
    same = [token == text[i] for i, step in enumerate(drawn) for token, text in zip(step, texts, strict=True)]
    print(f"equal greedy tokens: {sum(same)} of {len(same)}")
    assert len(same) == TOKENS * len(PROMPTS) and sum(same) >= 0.99 * len(same)
