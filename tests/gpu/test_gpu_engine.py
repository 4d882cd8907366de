"""The engine on a GPU: transformers' tokens on small models, and Qwen2-7B's shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from microvllm import InferenceEngine, KernelSet

from ..parity import RAGGED, Models, assert_parity
from ..small_models import pairwise_shapes

QWEN2_7B = Path(__file__).parents[2] / "bench" / "shapes" / "qwen2-7b"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory)


@pytest.mark.parametrize("shape", pairwise_shapes(), ids=str)
def test_transformers_greedy_tokens_in_float32(models, shape):
    kernels = KernelSet.reference()
    options = {"device": "cuda", "dtype": "float32", "max_prefill_tokens": 16}
    assert_parity(models, shape, RAGGED, kernels, enforce_eager=True, **options)  # references wait for the device


def test_small_blocks_say_what_flash_attn_needs():
    if KernelSet.default("cuda").names["prefill_attention"] != "flash_attn":
        pytest.skip("flash-attn is not installed")
    with pytest.raises(ValueError, match="multiples of 256"):
        InferenceEngine(QWEN2_7B, load_format="dummy", block_size=16, max_model_len=512, progress=False)


@pytest.fixture(scope="module")
def qwen2_7b():
    return InferenceEngine(QWEN2_7B, max_batch_size=64, load_format="dummy", device="cuda", progress=False)


def prompts(count: int, vocab_size: int = 152064) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(128, 513, (count,), generator=generator).tolist()
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def test_qwen2_7b_generates_within_its_share_of_the_memory(qwen2_7b):
    outputs = qwen2_7b.generate(prompts(64), max_tokens=32, ignore_eos=True)
    assert [len(output.token_ids) for output in outputs] == [32] * 64
    assert all(output.finish_reason == "length" for output in outputs)
    assert len({token for output in outputs for token in output.token_ids}) > 64
    free, total = torch.cuda.mem_get_info()
    assert total - free <= 0.9 * total
    qwen2_7b.cache_manager.check()
    assert qwen2_7b.stats().blocks_used == 0


def test_a_seed_draws_the_same_tokens_again(qwen2_7b):
    options = {"max_tokens": 16, "temperature": 1.0, "top_p": 0.95, "top_k": 1000, "seed": 7, "ignore_eos": True}
    (prompt,) = prompts(1)
    first, second = (qwen2_7b.generate([prompt], **options)[0] for _ in range(2))
    assert second.usage.cached_tokens == (len(prompt) - 1) // 256 * 256
    # The second time a prefix comes from the cache and the logits differ by rounding: equal until a close call.
    assert first.token_ids[:4] == second.token_ids[:4]
    third = qwen2_7b.generate([prompt], **options)[0]
    assert third.token_ids == second.token_ids


def test_log_probabilities_are_those_of_a_distribution(qwen2_7b):
    (output,) = qwen2_7b.generate(prompts(1), max_tokens=4, logprobs=5, prompt_logprobs=1)
    assert len(output.prompt_logprobs) == output.usage.prompt_tokens
    for entry in (*output.logprobs, *output.prompt_logprobs[1:]):
        assert entry.logprob <= 0
        assert sorted(entry.top, key=lambda pair: -pair[1]) == entry.top
    # The likeliest token is drawn, though of several that are equally likely the list may begin with another.
    assert all((entry.token_id, entry.top[0][1]) in entry.top for entry in output.logprobs)
