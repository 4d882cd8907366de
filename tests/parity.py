"""A small model in the engine and in transformers: the same logits, the same greedy tokens?"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from microvllm import InferenceEngine, KernelSet
from microvllm.engine.lab.forced import RecordingSampler, forced_steps

from .small_models import VOCAB_SIZE, Shape, make_model, transformers_logits

TOKENS = 64
RAGGED = [1, 17, 5, 40]
BLOCK_SIZE = 16
OPTIONS = {"num_blocks": 64, "block_size": BLOCK_SIZE, "device": "cpu", "progress": False}
ONE_OF_EACH = [Shape("qwen2"), Shape("qwen3", tied=True, rope="yarn"), Shape("llama", group=4, rope="llama3")]


class Models:
    """Makes each shape's model once, and its prompts."""

    def __init__(self, tmp_path_factory):
        self._tmp_path_factory = tmp_path_factory
        self._made = {}

    def __call__(self, shape: Shape, *lengths: int) -> tuple[torch.nn.Module, Path, list[list[int]]]:
        """transformers' model, its folder, and a telling prompt of each length"""
        if shape not in self._made:
            folder = self._tmp_path_factory.mktemp(str(shape))
            self._made[shape] = (make_model(shape, folder), folder, {})
        model, folder, prompts = self._made[shape]
        for length in lengths:
            if length not in prompts:
                prompts[length] = telling_prompt(model, length)
        return model, folder, [prompts[length] for length in lengths]


def make_engine(folder, kernels: KernelSet | None = None, **options) -> InferenceEngine:
    engine = InferenceEngine(folder, kernels=kernels, **OPTIONS | options)
    engine.runner.sampler = RecordingSampler(engine.kernels)
    return engine


@torch.inference_mode()
def telling_prompt(model, length: int) -> list[int]:
    """The first random prompt whose greedy text goes round in no circle and has no close calls."""
    for seed in range(100):
        prompt = random.Random(seed).choices(range(VOCAB_SIZE), k=length)
        ids = torch.tensor([prompt])
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)[
            0
        ].tolist()
        logits = transformers_logits(model, text)[length - 1 : -1]
        first, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
        if len(set(text[length:])) >= 40 and (first - second).min() >= 1e-4 * logits.abs().max():
            return prompt
    raise AssertionError("no random prompt tells a right model from a wrong one")


def generate(engine: InferenceEngine, prompts: list[list[int]], before_step=lambda step: None, tokens: int = TOKENS):
    """Greedy outputs in order, `before_step(k)` being called before step k."""
    ids = [engine.add_request(prompt, max_tokens=tokens) for prompt in prompts]
    outputs, step = {}, 0
    while engine.has_work:
        before_step(step)
        outputs |= {event.request_id: event.output for event in engine.step() if event.output}
        step += 1
    return [outputs[i] for i in ids]


def forced_tokens(engine: InferenceEngine, prompts, texts) -> list[list[int]]:
    """What the engine draws greedily at each step of the texts, whatever it drew before."""
    return [[token for _, token, _ in step] for step in forced_steps(engine, prompts, texts)]


def assert_like_transformers(model, engine: InferenceEngine, outputs, distinct: int = 40) -> None:
    """Logits within 1e-4 of the largest; every token transformers' likeliest after those before it, no close call."""
    for output in outputs:
        tokens = output.token_ids
        assert len(tokens) == TOKENS
        start = len(output.prompt) - 1
        expected = transformers_logits(model, output.prompt + tokens)[start : start + TOKENS]
        got = torch.stack([engine.runner.sampler.logits[output.request_id, i] for i in range(TOKENS)])
        difference = (got - expected).abs().max()
        assert difference <= 1e-4 * expected.abs().max()
        assert tokens == expected.argmax(dim=-1).tolist()
        first, second = expected.topk(2, dim=-1).values.unbind(dim=-1)
        assert (first - second).min() >= 10 * difference, "a close call: the comparison of tokens would be luck"
        assert len(set(tokens)) >= distinct, "a text in circles: a broken model could pass"


def assert_parity(models, shape: Shape, lengths: list[int], kernels: KernelSet | None = None, **options) -> None:
    model, folder, prompts = models(shape, *lengths)
    engine = make_engine(folder, kernels, **options)
    assert_like_transformers(model, engine, generate(engine, prompts))
