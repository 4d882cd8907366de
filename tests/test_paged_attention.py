"""Decode attention's launches: each gives the same function, whatever the batch it is meant for."""

from __future__ import annotations

import pytest
import torch
from microvllm.kernels import append_attention, paged_attention
from microvllm.kernels.op import Case

CASE = Case(batch=2, context=700, shortest=3, heads=6, kv_heads=2, head_dim=64, block_size=16, padded=1)


@pytest.mark.parametrize("items", [1, 9, 65, 257])
def test_every_launch_gives_the_same_function(monkeypatch, items):
    launch = paged_attention._launch(items, bytes_per_head=256, appends=False)
    monkeypatch.setattr(paged_attention, "_launch", lambda *sizes: launch)
    report = paged_attention.OP.check("triton", [CASE], dtypes=[torch.float32])
    assert report.ok, f"\n{report}"


def test_attention_of_few_sequences_asks_for_a_carve_out(monkeypatch):
    asked = []
    monkeypatch.setattr(paged_attention, "prefer_carve_out", lambda kernel, percent: asked.append(percent))
    for batch in (4, 5):
        case = Case(batch=batch, context=1, heads=2, kv_heads=2, head_dim=16, block_size=16)
        assert paged_attention.OP.check("triton", [case], dtypes=[torch.float32]).ok
    assert set(asked[: len(asked) // 2]) == {44} and set(asked[len(asked) // 2 :]) == {None}


@pytest.mark.parametrize("warps, tile", [(1, 16), (2, 32), (4, 64), (4, 128)])
@pytest.mark.parametrize("op", [paged_attention.OP, append_attention.OP], ids=lambda op: op.name)
def test_any_tile_gives_the_same_function(monkeypatch, op, warps, tile):
    """Of a part of a block for each warp, of a block and of several."""
    launch = {"chunks": 20, "MIN_CHUNK": tile, "TILE": tile, "STAGES": 2, "WARPS": warps}
    monkeypatch.setattr(paged_attention, "_launch", lambda *sizes: launch)
    report = op.check("triton", [CASE], dtypes=[torch.float32])
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"q": torch.zeros(2, 5, 64)}, "5 query heads do not divide among 2 KV heads"),
        ({"q": torch.zeros(2, 4, 32)}, "q's head_dim is 32, the cache's 64"),
        ({"q": torch.zeros(2, 4, 64).half()}, "q is torch.float16 and the cache torch.float32"),
        ({"v_cache": torch.zeros(3, 16, 1, 64)}, "k_cache is .* and v_cache"),
        ({"context_lens": torch.ones(3, dtype=torch.int32)}, "a row of q, of the table, and a length"),
        ({"block_table": torch.zeros(2, 0, dtype=torch.int32)}, r"has an entry at least, and it is \[2, 0\]"),
        ({"k_scale": torch.ones(2), "v_scale": torch.ones(2)}, "k_scale and v_scale belong to a float8 cache"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    inputs = {
        "q": torch.zeros(2, 4, 64),
        "k_cache": torch.zeros(3, 16, 2, 64),
        "v_cache": torch.zeros(3, 16, 2, 64),
        "block_table": torch.zeros(2, 1, dtype=torch.int32),
        "context_lens": torch.ones(2, dtype=torch.int32),
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=words):
        paged_attention.paged_attention(**(inputs | change))
