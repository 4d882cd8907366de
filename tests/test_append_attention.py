"""The fused decode operator: flash-attn's adapter on a stand-in for the library, and what it refuses."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from microvllm.kernels.append_attention import OP, flash_attn_append
from microvllm.kernels.op import Case

SIZES = {"heads": 2, "kv_heads": 1, "head_dim": 16, "block_size": 256}


def inputs(dtype: torch.dtype = torch.float16, **sizes: int) -> dict:
    case = Case(**{"batch": 2, "context": 300, "shortest": 5, **SIZES, **sizes})
    generator = torch.Generator().manual_seed(0)
    return OP.inputs(**case.sizes, dtype=dtype, device=torch.device("cpu"), generator=generator)


@pytest.fixture
def calls(monkeypatch):
    calls, module = [], ModuleType("flash_attn")

    def with_kvcache(q, *args, **options):
        calls.append((q, args, options))
        return q

    module.flash_attn_with_kvcache = with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_attn_is_told_where_everything_lies(calls, dtype):
    given = inputs(dtype)
    assert OP.implementations["flash_attn"].refuses(**given) is None
    assert flash_attn_append(**given).equal(given["q"])
    ((q, caches, options),) = calls
    assert q.shape == (2, 1, 2, 16) and all(options[name].shape == (2, 1, 1, 16) for name in "kv")
    assert caches[0] is given["k_cache"] and caches[1] is given["v_cache"]
    assert options["cache_seqlens"].tolist() == [4, 299] and options["cache_seqlens"].dtype == torch.int32
    assert options["rotary_cos"].dtype == options["rotary_sin"].dtype == dtype
    assert options["rotary_interleaved"] is False and options["block_table"] is given["block_table"]
    assert options["softmax_scale"] == 0.25


@pytest.mark.parametrize(
    "sizes, changes, words",
    [
        ({"block_size": 16}, {}, "multiples of 256 tokens.*or the implementation 'triton'"),
        ({"dtype": torch.float32}, {}, "float16 and bfloat16, not in torch.float32"),
        ({"head_dim": 24}, {}, "multiples of 16, and head_dim is 24"),
        ({}, {"cos": torch.zeros(300, 8)}, "all 768 tokens .*, not for 300"),
    ],
)
def test_what_flash_attn_cannot_is_refused_before_the_call(calls, sizes, changes, words):
    given = inputs(**sizes) | changes
    with pytest.raises(ValueError, match=words) as raised:
        flash_attn_append(**given)
    assert OP.implementations["flash_attn"].refuses(**given) == str(raised.value)
    assert not calls


@pytest.mark.parametrize(
    "sizes, changes, words",
    [({"padded": 1}, {}, "appends every row"), ({}, {"positions": torch.tensor([0, 1])}, "position")],
)
def test_rows_that_flash_attn_would_take_for_others_are_refused(sizes, changes, words):
    assert words in OP.implementations["flash_attn"].refuses(**inputs(**sizes) | changes)
