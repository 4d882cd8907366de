"""The engine against transformers, in float32 on small random models: the same logits and the same greedy tokens."""

from __future__ import annotations

import os

import pytest
import torch
from microvllm import KernelSet
from microvllm.engine.policy import POLICIES
from microvllm.kernels.kernel_set import OPS
from microvllm.kernels.prefill_attention import prefill_attention_reference
from microvllm.kernels.rotary_store_kv import rotary_store_kv_reference, store_kv_reference

from .checkpoints import save_folder
from .parity import (
    BLOCK_SIZE,
    ONE_OF_EACH,
    OPTIONS,
    RAGGED,
    Models,
    assert_like_transformers,
    assert_parity,
    generate,
    make_engine,
)
from .small_models import Shape, pairwise_shapes


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory)


@pytest.fixture(scope="module", params=[False, True], ids=["in step", "a step behind"])
def both_ways(request):
    """Tokens are read before the next step is launched, and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPTIONS, "async_scheduling", request.param)
        yield


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("shape", pairwise_shapes(), ids=str)
class TestEveryShape:
    def test_one_request(self, models, shape):
        assert_parity(models, shape, [40])

    @pytest.mark.parametrize("policy", POLICIES)
    def test_a_ragged_batch_under_each_policy(self, models, shape, policy):
        assert_parity(models, shape, RAGGED, policy=policy)

    @pytest.mark.parametrize("chunk", [1, 7, 16, 256])
    def test_prompts_in_chunks(self, models, shape, chunk):
        assert_parity(models, shape, RAGGED, max_prefill_tokens=chunk)

    @pytest.mark.parametrize("length", [2 * BLOCK_SIZE - 1, 2 * BLOCK_SIZE, 2 * BLOCK_SIZE + 1])
    def test_prefix_hits(self, models, shape, length):
        model, folder, prompts = models(shape, length)
        engine = make_engine(folder)
        for cached in (0, (length - 1) // BLOCK_SIZE * BLOCK_SIZE, (length - 1) // BLOCK_SIZE * BLOCK_SIZE):
            outputs = generate(engine, prompts)
            assert outputs[0].usage.cached_tokens == cached
            assert_like_transformers(model, engine, outputs)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("window", [0, 16])
def test_aligned_batches(models, window):
    assert_parity(models, Shape(), RAGGED, alignment_window=window)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("victim, prefix_caching", [(0, False), (-1, True)], ids=["oldest", "newest, prefix cached"])
@pytest.mark.parametrize("shape", ONE_OF_EACH, ids=str)
def test_a_preemption_at_every_possible_step(models, shape, victim, prefix_caching):
    model, folder, prompts = models(shape, 33, 20)
    engine = make_engine(folder, max_prefill_tokens=16, enable_prefix_caching=prefix_caching)
    undisturbed = generate(engine, prompts)
    assert_like_transformers(model, engine, undisturbed)

    tokens, steps = 24, []  # both texts come into another block
    expected = [output.token_ids[:tokens] for output in undisturbed]
    assert [o.token_ids for o in generate(engine, prompts, steps.append, tokens)] == expected
    for step in steps[1:]:  # before the first nothing runs

        def preempt(now: int, step: int = step) -> None:
            if now == step:
                engine.scheduler.preempt(engine.scheduler.running[victim])

        disturbed = generate(engine, prompts, preempt, tokens)
        assert [o.token_ids for o in disturbed] == expected, f"preempted before step {step}"
    assert engine.stats().preemptions == len(steps) - 1 >= tokens - 1


def no_rope(q, k, v, cos, sin, positions, *cache):
    store_kv_reference(k, v, *cache)
    return q


def decode_a_position_late(q, k, v, cos, sin, positions, *cache):
    late = positions + 1 if len(positions) == 1 else positions
    return rotary_store_kv_reference(q, k, v, cos, sin, late, *cache)


def roll_k_heads(q, k, v, *rest):
    return rotary_store_kv_reference(q, k.roll(1, dims=1), v, *rest)


def chunk_sees_one_token_less(q, k_cache, v_cache, block_table, query_start, context_lens, *rest):
    out = prefill_attention_reference(q, k_cache, v_cache, block_table, query_start, context_lens, *rest)
    late = q.roll(-1, dims=0)  # query i at the place of query i − 1 sees what that one sees
    shifted = prefill_attention_reference(late, k_cache, v_cache, block_table, query_start, context_lens, *rest)
    return torch.cat([out[:1], shifted[:-1]])


@pytest.mark.parametrize("shape", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize(
    "bug",
    [
        {"rotary_store_kv": no_rope},
        {"rotary_store_kv": decode_a_position_late},
        {"rotary_store_kv": roll_k_heads},
        {"prefill_attention": chunk_sees_one_token_less},
    ],
    ids=lambda bug: next(iter(bug.values())).__name__,
)
def test_planted_bugs_are_caught(models, shape, bug):
    with pytest.raises(AssertionError):
        assert_parity(models, shape, [40], KernelSet.default("cpu").replace(**bug), max_prefill_tokens=16)
    assert_parity(models, shape, [40], max_prefill_tokens=16)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles for the GPU there is")
def test_triton_kernels_in_the_engine(tmp_path, few_programs):
    """All of them at once, on a greedy text and a drawn one, in chunks, beside the references.

    The model is a very small one: a program of the interpreter takes 5 ms, and a linear layer has one an output.
    """
    swaps = {name: "triton" for name, op in OPS.items() if "triton" in op.implementations}
    swaps |= dict.fromkeys(("linear", "linear_add", "linear_add_norm"), "skinny")
    assert set(swaps) == set(OPS)
    save_folder(tmp_path, "qwen3", hidden_size=40, num_attention_heads=6, tie_word_embeddings=True, eos_token_id=None)
    prompts = [list(range(40)), list(range(95, 78, -1))]
    drawn = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "seed": 3}
    texts, logprobs = [], []
    for kernels in (KernelSet.reference(), KernelSet.reference().replace(**swaps)):
        engine = make_engine(tmp_path, kernels, max_prefill_tokens=16)
        for prompt, options in zip(prompts, ({}, drawn), strict=True):
            engine.add_request(prompt, max_tokens=3, logprobs=0, **options)
        events = []
        while engine.has_work:
            events += engine.step()
        texts.append([(event.request_id, event.token_id) for event in events])
        logprobs.append([event.logprobs.logprob for event in events])
    assert texts[0] == texts[1] and len(texts[0]) == 6
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
