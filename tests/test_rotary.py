"""Rotary's kernels where a program takes four tokens, as it does of thousands with short heads."""

from __future__ import annotations

import pytest
import torch
from microvllm.kernels import rotary, rotary_store_kv
from microvllm.kernels.op import Case


@pytest.mark.parametrize("tokens", [1, 8, 11])
def test_a_program_may_take_four_tokens(monkeypatch, tokens):
    chosen = rotary.launch_shape
    for module in (rotary, rotary_store_kv):
        monkeypatch.setattr(module, "launch_shape", lambda *a, **b: chosen(*a, **b) | {"BLOCK_TOKENS": 4})
    sizes = {"tokens": tokens, "heads": 5, "kv_heads": 2, "head_dim": 8}
    for op, case in ((rotary.OP, Case(**sizes)), (rotary_store_kv.OP, Case(**sizes, block_size=4, padded=1))):
        report = op.check("triton", [case], dtypes=[torch.float32], device="cpu")
        assert report.ok, f"\n{report}"


@pytest.mark.parametrize("tokens, half, taken", [(2049, 32, 4), (2048, 32, 1), (4096, 64, 1)])
def test_only_of_thousands_with_short_heads(tokens, half, taken):
    assert rotary.launch_shape(tokens, 16, half, most_heads=32)["BLOCK_TOKENS"] == taken
