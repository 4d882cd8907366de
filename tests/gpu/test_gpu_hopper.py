"""The Hopper kernel of prefill attention: all ways that pages share a tile, what it is called for, changing lengths."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from microvllm.kernels import prefill_attention
from microvllm.kernels.hopper_prefill import hopper_prefill, refused_by_hopper
from microvllm.kernels.op import Case
from microvllm.kernels.prefill_attention import HOPPER_OVER, OP

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="a Hopper GPU alone runs it"
)

BF16 = torch.bfloat16
GPU = torch.device("cuda")
CASES = [
    *(
        Case(prompts=3, query=300, shortest=1, heads=4, kv_heads=2, head_dim=head_dim, block_size=block, prefix=333)
        for head_dim in (64, 128)
        for block in (8, 16, 32, 64, 128, 256)
    ),
    Case(prompts=1, query=1, heads=1, kv_heads=1, head_dim=128, block_size=16),
    Case(prompts=150, query=257, shortest=0, heads=14, kv_heads=2, head_dim=64, block_size=256, prefix=150),
    Case(prompts=2, query=2500, shortest=2049, heads=28, kv_heads=4, head_dim=128, block_size=256, prefix=129),
]


def drawn(case: Case) -> dict:
    generator = torch.Generator(GPU).manual_seed(0)
    return OP.inputs(**case.sizes, dtype=BF16, device=GPU, generator=generator)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_it_is_as_right_as_the_reference(case, dtype):
    report = OP.check(hopper_prefill, [case], dtypes=[dtype], device="cuda")
    assert report.ok, f"\n{report}"


FIRST = HOPPER_OVER[128][0] + 1


@pytest.mark.parametrize(
    "prompts, tokens, head_dim, called",
    [
        (1, FIRST, 128, True),
        (1, FIRST - 1, 128, False),
        (64, 32, 128, False),
        (1, FIRST, 64, False),
        (1, 3000, 80, False),
    ],
)
def test_the_operator_calls_it_for_what_it_takes(monkeypatch, prompts, tokens, head_dim, called):
    given = drawn(Case(prompts=prompts, query=tokens, heads=2, kv_heads=1, head_dim=head_dim, block_size=16))
    assert (refused_by_hopper(given["q"], given["k_cache"], given["v_cache"]) is None) == (head_dim != 80)
    monkeypatch.setattr(prefill_attention, "hopper_prefill", lambda *args: "called")
    assert isinstance(prefill_attention.prefill_attention(**given), str) == called


@pytest.mark.parametrize("block_size", [16, 256])
def test_in_a_captured_graph_it_follows_lengths_and_tables(block_size):
    """It gives the bits of a call outside the graph for the chunks alone, though the graph has room for more."""
    tokens, rows = 1024, 4
    given = drawn(Case(prompts=rows, query=700, heads=28, kv_heads=4, head_dim=128, block_size=block_size))
    q, k, v, table = given["q"][:tokens], given["k_cache"], given["v_cache"], given["block_table"]
    starts, contexts = (torch.zeros(n, dtype=torch.int32, device=GPU) for n in (rows + 1, rows))
    held = torch.empty_like(table)
    graph = torch.cuda.CUDAGraph()
    call = (held, starts, contexts, tokens, 700, 128**-0.5)
    prefill_attention.prefill_attention(q, k, v, *call)
    with torch.cuda.graph(graph):
        captured = prefill_attention.prefill_attention(q, k, v, *call)
    lives = [
        [(0, 512)],
        [(100, 30), (0, 1), (300, 200)],
        [(0, 0), (5, 128), (0, 129), (400, 3)],
        [(0, 0)],
        [(188, 512)],
    ]
    for chunks in (*lives, *reversed(lives)):
        n, total = len(chunks), sum(own for _, own in chunks)
        ends = list(accumulate((own for _, own in chunks), initial=0))
        starts.copy_(torch.tensor(ends + [total] * (rows - n)))
        contexts.copy_(torch.tensor([before + own for before, own in chunks] + [0] * (rows - n)))
        held.copy_(table.roll(n, 0))
        graph.replay()
        longest = max(1, *(own for _, own in chunks))
        alone = (held[:n], starts[: n + 1], contexts[:n], longest, 700, 128**-0.5)
        expected = prefill_attention.prefill_attention(q, k, v, *alone)
        assert captured[:total].equal(expected[:total])
        assert captured[:total].isfinite().all()
