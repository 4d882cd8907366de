"""Attention on a GPU: flash-attn and the references against each other, judged by a float64 truth."""

from __future__ import annotations

import pytest
import torch
from microvllm.kernels.paged_attention import paged_attention_reference
from microvllm.kernels.prefill_attention import flash_attn_prefill, prefill_attention_reference

flash_attn = pytest.importorskip("flash_attn", reason="flash-attn is not installed")

DTYPES = [torch.float16, torch.bfloat16]
HEADS = [(28, 4, 128), (14, 2, 64), (9, 3, 64), (8, 8, 128)]


def make_cache(blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, blocks, 256, kv_heads, head_dim, device="cuda", dtype=dtype).unbind(0)


def make_block_table(contexts: list[int], blocks: int) -> torch.Tensor:
    """Blocks in random order, with ids that are none behind each context."""
    order = iter(torch.randperm(blocks).tolist())
    width = max(-(-c // 256) for c in contexts)
    rows = [[next(order) for _ in range(-(-c // 256))] for c in contexts]
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32, device="cuda")


def poison_what_must_not_be_read(cache: torch.Tensor, block_table: torch.Tensor, contexts: list[int]) -> None:
    kept = torch.zeros(cache.shape[:2], dtype=torch.bool, device="cuda")
    for row, context in zip(block_table.tolist(), contexts, strict=True):
        for i in range(-(-context // 256)):
            kept[row[i], : context - i * 256] = True
    cache[~kept] = torch.nan


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    assert not got.isnan().any()
    return (got.double() - truth).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads, head_dim", HEADS)
def test_flash_attn_prefill_is_as_right_as_the_reference(dtype, heads, kv_heads, head_dim):
    torch.manual_seed(0)
    lengths, contexts = (
        [1, 300, 256, 77, 512],
        [1, 300, 1000, 589, 512],
    )  # some with a prefix in the cache, some without
    k_cache, v_cache = make_cache(16, kv_heads, head_dim, dtype)
    table = make_block_table(contexts, 16)
    q = torch.randn(sum(lengths), heads, head_dim, device="cuda", dtype=dtype)
    start = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    where = (table, start, torch.tensor(contexts, device="cuda", dtype=torch.int32), max(lengths), max(contexts))
    truth = prefill_attention_reference(q.double(), k_cache.double(), v_cache.double(), *where, head_dim**-0.5)
    reference = prefill_attention_reference(q, k_cache, v_cache, *where, head_dim**-0.5)
    # flash-attn masks rows past a context by arithmetic, which NaN would survive: its values there are finite garbage.
    got = flash_attn_prefill(q, k_cache, v_cache, *where, head_dim**-0.5)
    assert error(got, truth) <= 2 * error(reference, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads, head_dim", HEADS)
def test_the_paged_attention_reference_is_as_right_as_flash_attn(dtype, heads, kv_heads, head_dim):
    torch.manual_seed(0)
    contexts = [1, 255, 256, 257, 1000, 4096]
    k_cache, v_cache = make_cache(32, kv_heads, head_dim, dtype)
    table = make_block_table(contexts, 32)
    lengths = torch.tensor(contexts, device="cuda", dtype=torch.int32)
    q = torch.randn(len(contexts), heads, head_dim, device="cuda", dtype=dtype)
    scale = head_dim**-0.5
    truth = paged_attention_reference(q.double(), k_cache.double(), v_cache.double(), table, lengths, scale)
    flash = flash_attn.flash_attn_with_kvcache(
        q.unsqueeze(1), k_cache, v_cache, cache_seqlens=lengths, block_table=table, softmax_scale=scale, causal=True
    ).squeeze(1)
    poison_what_must_not_be_read(k_cache, table, contexts)
    poison_what_must_not_be_read(v_cache, table, contexts)
    got = paged_attention_reference(q, k_cache, v_cache, table, lengths, scale)
    assert error(got, truth) <= 2 * error(flash, truth)


def test_flash_attn_refuses_what_it_cannot_page():
    cache = torch.zeros(4, 16, 2, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"multiples of 256.*block size is 16"):
        flash_attn_prefill(cache[0], cache, cache, *[None] * 5, 1.0)
