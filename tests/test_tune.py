"""bench.tune: every candidate has the parameters of its kernel, and nothing of a sweep stays behind."""

from __future__ import annotations

import pytest
import torch
from microvllm.bench.tune import SWEEPS, THE_TABLES, grid, in_a_word, overall, shown
from microvllm.kernels.op import Case

SMALL = {
    "paged_attention": Case(batch=1, context=40, heads=2, kv_heads=1, head_dim=64, block_size=16),
    "prefill_attention": Case(prompts=1, query=17, heads=2, kv_heads=2, head_dim=64, block_size=16),
    "_one_row_launch": Case(rows=1, outputs=5, inputs=264),
    "_few_rows_launch": Case(rows=3, outputs=70, inputs=1160),
    "norm_linear": Case(tokens=1, outputs=5, inputs=264),
    "norm_qkv_rotary_store_kv": Case(tokens=1, heads=1, kv_heads=1, head_dim=6, inputs=264, block_size=4),
    "linear_swiglu": Case(tokens=3, intermediate=70, inputs=264),
    "norm_gate_up_swiglu": Case(tokens=1, intermediate=5, inputs=264),
    "rms_norm": Case(tokens=3, hidden=37),
    "add_rms_norm": Case(tokens=3, hidden=37),
    "rotary": Case(tokens=3, heads=2, kv_heads=1, head_dim=64),
    "rotary_store_kv": Case(tokens=3, heads=2, kv_heads=1, head_dim=64, block_size=4, padded=1),
    "sample": Case(rows=2, vocab=9000, kind="top_k_top_p", shape="peaked"),
    "swiglu": Case(tokens=3, intermediate=96),
}


@pytest.mark.parametrize(
    "sweep", [pytest.param(s, id=f"{name}-{s.chooser}") for name, sweeps in SWEEPS.items() for s in sweeps]
)
def test_candidates_are_launches_of_their_kernel(sweep):
    case = SMALL.get(sweep.op.name) or SMALL[sweep.chooser]
    chooser = getattr(sweep.module, sweep.chooser)
    for launch in (sweep.launches[0], sweep.launches[-1]):
        if launch.get("chunks"):  # of hundreds, nearly all have no token of the small case
            launch = {**launch, "chunks": 8}
        with sweep.choosing(launch):
            report = sweep.op.check(sweep.kernel, [case], dtypes=[torch.float32], device="cpu")
            assert report.ok, f"\n{report}"
    assert getattr(sweep.module, sweep.chooser) is chooser
    assert sweep.cases


def test_a_grid_is_every_combination():
    assert grid(a=(1, 2), b=(3,)) == ({"a": 1, "b": 3}, {"a": 2, "b": 3})


def test_the_fastest_are_shown_and_what_the_table_chooses():
    times = [(float(i), {"x": i}) for i in range(1, 9)]
    assert shown(times) == times[:5]
    assert shown([*times[:6], (6.5, None), *times[6:]]) == [*times[:5], (6.5, None)]
    assert shown([(0.5, None), *times]) == [(0.5, None), *times[:4]]
    assert in_a_word(None) == THE_TABLES and in_a_word({"a": 1, "b": {"c": 2, "d": 3}}) == "a=1 b: c=2 d=3"


def test_what_the_table_chooses_is_launched_as_it_says():
    sweep = SWEEPS["swiglu"][0]
    chooser = getattr(sweep.module, sweep.chooser)
    with sweep.choosing(None):
        assert getattr(sweep.module, sweep.chooser) is chooser


def test_the_best_launch_overall_serves_every_case():
    a, b, c = {"x": 1}, {"x": 2}, {"x": 3}
    ranked = overall([[(1.0, a), (1.5, b), (9.0, c)], [(2.0, c), (3.0, b), (8.0, a)]])
    assert [launch for _, launch in ranked] == [b, a, c]
    assert ranked[0][0] == pytest.approx(1.5)
    assert overall([[(1.0, a), (2.0, b)], [(1.0, b)]]) == [(pytest.approx(2**0.5), b)]
