"""Attention on a GPU: drawn shapes, lengths, tables and values; beside flash-attn; in a graph while lengths change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from microvllm.kernels import append_attention, paged_attention, prefill_attention
from microvllm.kernels.op import Case

F16, BF16 = torch.float16, torch.bfloat16
GPU = torch.device("cuda")
LONGEST = 3000

# heads, kv_heads, head_dim, block_size, dtype: few, because a kernel is compiled for each
SHAPES = [
    (1, 1, 64, 16, F16),
    (28, 4, 128, 256, BF16),
    (14, 2, 64, 32, BF16),
    (16, 1, 128, 16, F16),
    (9, 3, 80, 64, BF16),
    (10, 2, 96, 128, F16),
    (8, 8, 128, 16, BF16),
    (4, 2, 256, 256, F16),
]
VALUES = ["normal", "large", "tiny", "outlier"]

drawn = settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


def scattered_cache(
    contexts: list[int], shared: int, block_size: int, kv_heads: int, head_dim: int, dtype, generator, own: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(k_cache, v_cache, block_table) of texts whose first `shared` blocks, as far as these are full without the last
    `own` tokens, are the same.

    Blocks stand in random order. What no text holds is NaN, and what no text reaches in the table is no block's id.
    """
    common = [min(shared, max(context - own, 0) // block_size) for context in contexts]
    others = [-(-context // block_size) - full for context, full in zip(contexts, common, strict=True)]
    blocks = max(common) + sum(others) + 2
    order = iter(torch.randperm(blocks, device=GPU, generator=generator).tolist())
    first = [next(order) for _ in range(max(common))]
    table = torch.full((len(contexts), -(-LONGEST // block_size) + 1), 2**30, dtype=torch.int32)
    held = torch.zeros(blocks, block_size, dtype=torch.bool)
    for i, context in enumerate(contexts):
        row = first[: common[i]] + [next(order) for _ in range(others[i])]
        table[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
        for j, block in enumerate(row):
            held[block, : context - j * block_size] = True
    shape = (blocks, block_size, kv_heads, head_dim)
    k, v = (torch.randn(shape, dtype=dtype, device=GPU, generator=generator) for _ in range(2))
    k[~held.to(GPU)] = v[~held.to(GPU)] = torch.nan
    return k, v, table.to(GPU)


def scaled(values: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if values == "large":
        for x, factor in ((q, 4), (k, 4), (v, 100)):
            x.mul_(factor)
    elif values == "tiny":
        for x in (q, k, v):
            x.mul_(2.0**-10)
    elif values == "outlier":  # a token that stands out, as a text's first does in real models
        for x, factor in ((k, 5), (v, 300)):
            rows = x.flatten(0, 1)
            rows[rows[:, 0, 0].isfinite().nonzero()[:1].squeeze(1)] *= factor


def decode_inputs(contexts, shared, values, heads, kv_heads, head_dim, block_size, *, dtype, device, generator):
    k, v, table = scattered_cache(contexts, shared, block_size, kv_heads, head_dim, dtype, generator)
    q = torch.randn(len(contexts), heads, head_dim, dtype=dtype, device=device, generator=generator)
    scaled(values, q, k, v)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=device)
    return {
        "q": q,
        "k_cache": k,
        "v_cache": v,
        "block_table": table,
        "context_lens": lengths,
        "scale": head_dim**-0.5,
    }


def append_inputs(contexts, shared, values, heads, kv_heads, head_dim, block_size, *, dtype, device, generator):
    cache = scattered_cache(contexts, shared, block_size, kv_heads, head_dim, dtype, generator, own=1)
    q, k, v = (
        torch.randn(len(contexts), n, head_dim, dtype=dtype, device=device, generator=generator)
        for n in (heads, kv_heads, kv_heads)
    )
    scaled(values, q, *cache[:2])
    lengths = torch.tensor(contexts, dtype=torch.int32, device=device)
    return append_attention.inputs_of(q, k, v, *cache, lengths)


def prefill_inputs(chunks, shared, values, heads, kv_heads, head_dim, block_size, *, dtype, device, generator):
    """chunks: (tokens in the cache before it, tokens of its own) of each"""
    queries, contexts = [own for _, own in chunks], [cached + own for cached, own in chunks]
    k, v, table = scattered_cache(contexts, shared, block_size, kv_heads, head_dim, dtype, generator)
    q = torch.randn(sum(queries), heads, head_dim, dtype=dtype, device=device, generator=generator)
    scaled(values, q, k, v)
    return {
        "q": q,
        "k_cache": k,
        "v_cache": v,
        "block_table": table,
        "query_start": torch.tensor([0, *queries], device=device).cumsum(0).int(),
        "context_lens": torch.tensor(contexts, dtype=torch.int32, device=device),
        "max_query_len": max(queries),
        "max_context_len": max(contexts),
        "scale": head_dim**-0.5,
    }


def assert_right(op, inputs, shape, seed, **sizes) -> None:
    heads, kv_heads, head_dim, block_size, dtype = shape
    case = Case(**sizes, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size)
    report = replace(op, inputs=inputs).check("triton", [case], dtypes=[dtype], device=GPU, seed=seed)
    assert report.ok, f"\n{report}"


lengths = st.one_of(st.integers(0, 3), st.integers(1, 300), st.integers(1, LONGEST))


def repeated(contexts: list[int], times: int) -> list[int]:
    """Each some tokens longer every time: many programs at once are launched otherwise than few."""
    return [n + 7 * i if n else 0 for i in range(times) for n in contexts]


batches = st.one_of(
    st.lists(lengths, min_size=1, max_size=1),
    st.lists(lengths, min_size=5, max_size=8),
    st.builds(repeated, st.lists(st.integers(0, 500), min_size=5, max_size=8), st.sampled_from([3, 10])),
)


@drawn
@given(
    shape=st.sampled_from(SHAPES),
    contexts=batches,
    shared=st.integers(0, 4),
    values=st.sampled_from(VALUES),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("op, inputs", [(paged_attention.OP, decode_inputs), (append_attention.OP, append_inputs)])
def test_decode_is_right_whatever_is_drawn(op, inputs, shape, contexts, shared, values, seed):
    assert_right(op, inputs, shape, seed, contexts=contexts, shared=shared, values=values)


@drawn
@given(
    shape=st.sampled_from(SHAPES),
    chunks=st.lists(
        st.tuples(st.one_of(st.just(0), st.integers(1, 1000)), st.one_of(st.integers(1, 3), st.integers(1, 300))),
        min_size=1,
        max_size=5,
    ),
    shared=st.integers(0, 4),
    values=st.sampled_from(VALUES),
    seed=st.integers(0, 2**31),
)
def test_prefill_is_right_whatever_is_drawn(shape, chunks, shared, values, seed):
    assert_right(prefill_attention.OP, prefill_inputs, shape, seed, chunks=chunks, shared=shared, values=values)


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    assert got.isfinite().all()
    return (got.double() - truth).abs().max().item()


def in_double(inputs: dict) -> dict:
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in inputs.items()
    }


@pytest.fixture(scope="module")
def flash_attn():
    return pytest.importorskip("flash_attn", reason="flash-attn is not installed")


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(28, 4, 128), (14, 2, 64), (9, 3, 64), (8, 8, 128)])
class TestBesideFlashAttn:
    def draw(self, inputs, first, heads, kv_heads, head_dim, dtype):
        generator = torch.Generator(GPU).manual_seed(0)
        return inputs(first, 1, "normal", heads, kv_heads, head_dim, 256, dtype=dtype, device=GPU, generator=generator)

    def test_decode_is_as_right(self, flash_attn, heads, kv_heads, head_dim, dtype):
        contexts = [1, 255, 256, 257, 1000, 2999]
        inputs = self.draw(decode_inputs, contexts, heads, kv_heads, head_dim, dtype)
        truth = paged_attention.paged_attention_reference(**in_double(inputs))
        flash = flash_attn.flash_attn_with_kvcache(
            inputs["q"].unsqueeze(1),
            inputs["k_cache"].nan_to_num(),
            inputs["v_cache"].nan_to_num(),
            cache_seqlens=inputs["context_lens"],
            block_table=inputs["block_table"],
            softmax_scale=inputs["scale"],
            causal=True,
        ).squeeze(1)
        allowed = 2 * error(flash, truth)
        assert error(paged_attention.paged_attention(**inputs), truth) <= allowed
        assert error(paged_attention.paged_attention_reference(**inputs), truth) <= allowed

    def test_prefill_is_as_right(self, flash_attn, heads, kv_heads, head_dim, dtype):
        chunks = [(0, 1), (0, 300), (744, 256), (512, 77), (0, 512), (2000, 999)]
        inputs = self.draw(prefill_inputs, chunks, heads, kv_heads, head_dim, dtype)
        truth = prefill_attention.prefill_attention_reference(**in_double(inputs))
        flash = flash_attn.flash_attn_varlen_func(
            inputs["q"],
            inputs["k_cache"].nan_to_num(),
            inputs["v_cache"].nan_to_num(),
            cu_seqlens_q=inputs["query_start"],
            cu_seqlens_k=torch.nn.functional.pad(inputs["context_lens"].cumsum(0, dtype=torch.int32), (1, 0)),
            max_seqlen_q=inputs["max_query_len"],
            max_seqlen_k=inputs["max_context_len"],
            softmax_scale=inputs["scale"],
            causal=True,
            block_table=inputs["block_table"],
        )
        allowed = 2 * error(flash, truth)
        triton = prefill_attention.OP.implementations["triton"].function
        assert error(triton(**inputs), truth) <= allowed
        assert error(prefill_attention.prefill_attention_reference(**inputs), truth) <= allowed


@pytest.mark.parametrize("op", [paged_attention.OP, prefill_attention.OP], ids=lambda op: op.name)
def test_flash_attn_refuses_what_it_cannot_page(flash_attn, op):
    inputs = decode_inputs if op is paged_attention.OP else prefill_inputs
    texts = {"contexts": [5]} if op is paged_attention.OP else {"chunks": [(0, 5)]}
    case = Case(**texts, shared=0, values="normal", heads=2, kv_heads=2, head_dim=64, block_size=16)
    report = replace(op, inputs=inputs).check("flash_attn", [case], dtypes=[BF16], device=GPU)
    assert not report.ok and "multiples of 256 tokens, and the cache's block size is 16" in report.results[0].refused


def test_decode_in_a_captured_graph_follows_lengths_and_tables():
    """It gives the bits of a call outside the graph, though lengths and tables change between replays."""
    lives = [[1, 700, 2999, 0, 256, 16], [2, 701, 3000, 1, 257, 17], [0, 0, 0, 0, 0, 5], [3000] * 6, [0] * 6]
    generator = torch.Generator(GPU).manual_seed(0)
    k, v, _ = scattered_cache([3000] * 6, 0, 16, 4, 128, BF16, generator)
    k, v = k.nan_to_num(), v.nan_to_num()
    width = -(-LONGEST // 16)
    q = torch.randn(6, 28, 128, dtype=BF16, device=GPU, generator=generator)
    table = torch.zeros(6, width, dtype=torch.int32, device=GPU)
    context_lens = torch.zeros(6, dtype=torch.int32, device=GPU)
    arguments = (q, k, v, table, context_lens, 128**-0.5)
    paged_attention.paged_attention(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = paged_attention.paged_attention(*arguments)
    for contexts in (*lives, *reversed(lives)):
        q.normal_(generator=generator)
        ids = torch.randperm(k.shape[0], device=GPU, generator=generator)[: 6 * width]
        table.copy_(ids.view(6, width))
        context_lens.copy_(torch.tensor(contexts))
        graph.replay()
        assert captured.equal(paged_attention.paged_attention(*arguments))
        truth = paged_attention.paged_attention_reference(*(x.double() for x in (q, k, v)), *arguments[3:])
        rounded = paged_attention.paged_attention_reference(*arguments)
        assert error(captured, truth) <= 2 * error(rounded, truth)
