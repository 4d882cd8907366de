"""The fused decode operator: its launches, its edges, planted errors, and flash-attn's adapter on a stand-in."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from microvllm.kernels import paged_attention
from microvllm.kernels.append_attention import OP, append_attention, append_attention_reference, flash_attn_append
from microvllm.kernels.op import Case
from microvllm.kernels.paged_attention import paged_attention_reference
from microvllm.kernels.rotary import rotary_reference
from microvllm.kernels.rotary_store_kv import rotary_store_kv_reference, store_kv_reference

SIZES = {"heads": 2, "kv_heads": 1, "head_dim": 16, "block_size": 256}
CUT = {"chunks": 64, "MIN_CHUNK": 32, "TILE": 32, "STAGES": 2, "WARPS": 2}
"""A launch that cuts a short context into chunks of 32 tokens."""


def inputs(dtype: torch.dtype = torch.float16, **sizes: int) -> dict:
    case = Case(**{"batch": 2, "context": 300, "shortest": 5, **SIZES, **sizes})
    generator = torch.Generator().manual_seed(0)
    return OP.inputs(**case.sizes, dtype=dtype, device=torch.device("cpu"), generator=generator)


def small_inputs(**sizes: int) -> dict:
    """In float32, for the interpreter: contexts of 5 and 41, and a padded row."""
    return inputs(torch.float32, **{"context": 41, "block_size": 16, "kv_heads": 2, "heads": 6, "padded": 1, **sizes})


def copies(given: dict) -> dict:
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()}


def results(function, given: dict) -> list[torch.Tensor]:
    """What a call returns, and the caches after it."""
    call = copies(given)
    return [function(**call), call["k_cache"], call["v_cache"]]


def assert_right(given: dict) -> None:
    got, expected = results(append_attention, given), results(append_attention_reference, given)
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("items", [1, 9, 65, 257])
def test_every_launch_gives_the_same_function(monkeypatch, items):
    launch = paged_attention._launch(items, bytes_per_head=256, appends=True)
    monkeypatch.setattr(paged_attention, "_launch", lambda *sizes: launch)
    case = Case(batch=3, context=300, shortest=1, heads=6, kv_heads=2, head_dim=64, block_size=16, padded=1)
    report = OP.check("triton", [case], dtypes=[torch.float32])
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("context", [1, 2, 32, 33, 34, 65, 97])
@pytest.mark.parametrize("chunks", [0, 64], ids=["whole", "cut"])
def test_chunks_may_end_at_the_new_token_or_hold_it_alone(monkeypatch, chunks, context):
    monkeypatch.setattr(paged_attention, "_launch", lambda *sizes: CUT | {"chunks": chunks})
    case = Case(batch=1, context=context, heads=7, kv_heads=1, head_dim=64, block_size=16)
    report = OP.check("triton", [case])
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("head_dim", [2, 16, 80, 96])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (16, 1), (10, 2), (3, 3)])
def test_any_group_and_head_size(few_programs, head_dim, heads, kv_heads):
    case = Case(batch=2, context=36, shortest=3, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=32)
    report = OP.check("triton", [case], dtypes=[torch.float32])
    assert report.ok, f"\n{report}"


def test_the_cache_changes_at_the_slots_alone(few_programs):
    given = small_inputs()
    slots = given["slot_mapping"][:2]
    assert slots.min() >= 0 and given["slot_mapping"][2] == -1
    _, k_cache, v_cache = results(append_attention, given)
    _, rotated = rotary_reference(*(given[name] for name in ("q", "k", "cos", "sin", "positions")))
    torch.testing.assert_close(k_cache.flatten(0, 1)[slots], rotated[:2])
    assert v_cache.flatten(0, 1)[slots].equal(given["v"][:2])
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        before, after = (x.flatten(0, 1).clone() for x in (given[name], cache))
        before[slots] = after[slots] = 0
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def test_a_token_without_a_slot_is_attended_to_and_written_nowhere(few_programs):
    given = small_inputs()
    out, _, _ = results(append_attention, given)
    nowhere, *caches = results(append_attention, given | {"slot_mapping": torch.full((3,), -1)})
    assert nowhere.equal(out) and not out[:2].isnan().any() and not out[2].any()
    for cache, before in zip(caches, (given["k_cache"], given["v_cache"]), strict=True):
        torch.testing.assert_close(cache, before, rtol=0, atol=0, equal_nan=True)


def test_a_position_need_not_be_the_contexts_end(few_programs):
    given = small_inputs()
    angle = torch.rand(9, 8)
    changes = {"cos": angle.cos(), "sin": angle.sin(), "positions": torch.tensor([8, 3, 0], dtype=torch.int32)}
    assert_right(given | changes)


def test_strides_are_free(few_programs):
    given = small_inputs()
    for name in ("k_cache", "v_cache"):  # [blocks, kv_heads, block_size, head_dim] in memory
        given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    for name in ("q", "k", "v"):
        given[name] = given[name].transpose(0, 1).contiguous().transpose(0, 1)
    got = copies(given)
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        got[name] = torch.empty_strided(given[name].shape, given[name].stride()).copy_(given[name])
        assert not got[name].is_contiguous()
    expected = results(append_attention_reference, given)
    torch.testing.assert_close([append_attention(**got), got["k_cache"], got["v_cache"]], expected, equal_nan=True)


def attends_and_then_stores(q, k, v, cos, sin, positions, k_cache, v_cache, slots, *rest):
    before = k_cache.clone(), v_cache.clone()
    q = rotary_store_kv_reference(q, k, v, cos, sin, positions, k_cache, v_cache, slots)
    return paged_attention_reference(q, *before, *rest)


def forgets_the_new_token(q, k, v, cos, sin, positions, k_cache, v_cache, slots, table, lengths, scale):
    q = rotary_store_kv_reference(q, k, v, cos, sin, positions, k_cache, v_cache, slots)
    return paged_attention_reference(q, k_cache, v_cache, table, (lengths - 1).clamp(min=0), scale)


def stores_k_as_it_comes(q, k, v, cos, sin, positions, k_cache, v_cache, slots, *rest):
    out = append_attention_reference(q, k, v, cos, sin, positions, k_cache, v_cache, slots, *rest)
    store_kv_reference(k, v, k_cache, v_cache, slots)
    return out


def stores_padded_rows_too(q, k, v, cos, sin, positions, k_cache, v_cache, slots, *rest):
    out = append_attention_reference(q, k, v, cos, sin, positions, k_cache, v_cache, slots, *rest)
    v_cache.flatten(0, 1)[slots] = v
    return out


@pytest.mark.parametrize(
    "kernel", [attends_and_then_stores, forgets_the_new_token, stores_k_as_it_comes, stores_padded_rows_too]
)
def test_a_wrong_kernel_is_caught(kernel):
    case = Case(batch=2, context=41, shortest=5, heads=6, kv_heads=2, head_dim=16, block_size=16, padded=1)
    assert OP.check(append_attention_reference, [case], dtypes=[torch.float32]).ok
    assert not OP.check(kernel, [case], dtypes=[torch.float32]).ok


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"q": torch.zeros(3, 6, 16).half()}, "q and k have one dtype"),
        ({"q": torch.zeros(3, 5, 16)}, "5 query heads do not divide among 2 KV heads"),
        ({"v": torch.zeros(3, 2, 8)}, "v is as k"),
        ({"cos": torch.zeros(64, 16)}, r"cos is \[positions, head_dim/2\]"),
        ({"slot_mapping": torch.zeros(3, dtype=torch.int32)}, r"slot_mapping is \[tokens\] in int64"),
        ({"k_cache": torch.zeros(9, 16, 2, 16).to(torch.float8_e4m3fn)}, "k_cache is .* not .* in torch.float8_e4m3fn"),
        ({"v_cache": torch.zeros(2, 16, 2, 16)}, "the caches are of different shapes"),
        ({"context_lens": torch.ones(2, dtype=torch.int32)}, "a row of q, of the table, and a length"),
    ],
)
def test_what_does_not_fit_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        append_attention(**small_inputs() | changes)


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
