"""The Triton prefill kernel beyond its operator's cases: tiles, strides, empty batches, refusals; and the reference."""

from __future__ import annotations

import pytest
import torch
from microvllm.kernels import prefill_attention
from microvllm.kernels.op import Case
from microvllm.kernels.prefill_attention import OP, prefill_attention_reference

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here: tests/gpu checks it there"
)

RAGGED = Case(prompts=4, query=70, shortest=0, heads=6, kv_heads=2, head_dim=32, block_size=32, prefix=45)


def inputs(case: Case, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)
    return OP.inputs(**case.sizes, dtype=dtype, device=torch.device("cpu"), generator=generator)


@pytest.mark.parametrize("queries, tokens", [(16, 16), (16, 64), (64, 32), (128, 128)])
def test_any_tile_gives_the_same_function(monkeypatch, queries, tokens):
    launch = {"BLOCK_M": queries, "BLOCK_N": tokens, "STAGES": 2, "num_warps": 4}
    monkeypatch.setattr(prefill_attention, "_launch", lambda *sizes: launch)
    report = OP.check("triton", [RAGGED], device="cpu")
    assert report.ok, f"\n{report}"


def test_the_strides_of_the_cache_are_free():
    given = inputs(RAGGED)
    expected = prefill_attention.prefill_attention(**given)
    for name in ("k_cache", "v_cache"):
        given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert prefill_attention.prefill_attention(**given).equal(expected)


def test_an_empty_batch_gives_nothing():
    cache = torch.zeros(1, 16, 1, 64)
    table, start, contexts = torch.zeros(0, 1).int(), torch.zeros(1).int(), torch.zeros(0).int()
    where = (table, start, contexts, 0, 0, 1.0)
    for function in (prefill_attention_reference, prefill_attention.prefill_attention):
        assert function(torch.zeros(0, 2, 64), cache, cache, *where).shape == (0, 2, 64)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"q": torch.zeros(140, 6, 32).double()}, "not in torch.float64"),
        ({"k_cache": torch.zeros(9, 32, 2, 32).half()}, "q is torch.float32, the cache torch.float16"),
        ({"k_cache": torch.zeros(2, 32, 2, 32)}, "k_cache is .* and v_cache"),
        ({"q": torch.zeros(140, 6, 16)}, "head_dim is 16, the cache's 32"),
        ({"q": torch.zeros(140, 5, 32)}, "5 query heads do not divide among 2"),
        ({"q": torch.zeros(140, 32, 6).transpose(1, 2)}, "must be contiguous"),
        ({"query_start": torch.zeros(4).int()}, "query_start"),
        ({"scale": 0.0}, "scale must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(ValueError, match=rf"^prefill_attention: .*{words}"):
        prefill_attention.prefill_attention(**inputs(RAGGED) | changes)


def test_the_reference_is_the_same_in_slices(monkeypatch):
    given = inputs(RAGGED, torch.float64)
    whole = prefill_attention_reference(**given)
    monkeypatch.setattr(prefill_attention, "REFERENCE_SCORES", 6 * 82 * 7)
    torch.testing.assert_close(prefill_attention_reference(**given), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("max_query_len", [16, 512])
def test_every_launch_fits_the_shared_memory_it_is_given(head_dim, max_query_len):
    for shared_memory in (99 << 10, 227 << 10):
        for itemsize in (2, 4):
            launch = prefill_attention._launch(head_dim, itemsize, 256, max_query_len, shared_memory)
            width = max(16, 1 << (head_dim - 1).bit_length()) * itemsize
            tiles = launch["BLOCK_M"] + 2 * launch["STAGES"] * launch["BLOCK_N"]
            assert tiles * width <= shared_memory
