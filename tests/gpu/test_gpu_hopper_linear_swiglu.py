"""The Hopper kernels of gate, up and SwiGLU: whole tiles, part of one, several turns, in a graph."""

from __future__ import annotations

import pytest
import torch
from microvllm.kernels.hopper_linear_swiglu import MOST_ROWS, hopper_linear_swiglu, refused_by_hopper
from microvllm.kernels.hopper_prefill_linear_swiglu import hopper_prefill_linear_swiglu, refused_by_hopper_prefill
from microvllm.kernels.linear_swiglu import OP, fused_linear_swiglu
from microvllm.kernels.op import Case

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="Hopper alone runs it"
)

ROWS = (33, 35, 64, 65, 96, 128)
DTYPES = (torch.float16, torch.bfloat16)


def refused(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    return refused_by_hopper(x, weight) if len(x) <= MOST_ROWS else refused_by_hopper_prefill(x, weight)


def checked(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Some of these sizes leave multiprocessors idle: that is no reason not to be right."""
    words = refused(x, weight)
    assert words is None or "busy" in words
    return hopper_linear_swiglu(x, weight) if len(x) <= MOST_ROWS else hopper_prefill_linear_swiglu(x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "intermediate, inputs",
    [
        (18944, 3584),
        (18943, 3584),  # odd: no two neighbours of a row of y are stored together
        (18936, 3584),
        (27648, 576),  # 192 or 384 tiles, 9 steps
        (145, 512),  # 1 column in the last tile; as few steps as there may be
        (1, 512),
    ],
)
def test_it_is_as_right_as_the_reference(rows, intermediate, inputs, dtype):
    case = Case(tokens=rows, intermediate=intermediate, inputs=inputs)
    report = OP.check(checked, [case], dtypes=[dtype], device="cuda")
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, intermediate, inputs",
    [
        (2048, 18944, 896),  # whole groups of whole tiles
        (2049, 18936, 576),  # a second group of one tile with one row; a last tile of 120 columns
        (1000, 18944, 3584),
        (129, 4864, 896),
        (4500, 136, 64),  # one step
        (1, 8, 192),  # one program, fewer steps than stages
    ],
)
def test_the_one_for_a_prefill_is_as_right_as_the_reference(rows, intermediate, inputs, dtype):
    case = Case(tokens=rows, intermediate=intermediate, inputs=inputs)
    report = OP.check(hopper_prefill_linear_swiglu, [case], dtypes=[dtype], device="cuda")
    assert report.ok, f"\n{report}"


def test_in_a_prefill_a_token_has_the_same_bits_among_others():
    x, weight = make(1500, torch.bfloat16).values()
    alone = hopper_prefill_linear_swiglu(x[700:701], weight)
    assert torch.equal(hopper_prefill_linear_swiglu(x, weight)[700:701], alone)


def make(rows: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows)
    return OP.inputs(rows, 18944, 3584, dtype=dtype, device=torch.device("cuda"), generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [*ROWS, 640, 1024])
def test_a_graph_computes_the_same_each_time(rows, dtype):
    """The second call's x is the first one's y: it must wait for it, though few rows' weights do not."""
    first, second = make(rows, dtype), make(rows, dtype)
    if torch.cuda.get_device_properties("cuda").multi_processor_count == 132:
        assert refused(**first) is None

    def run() -> torch.Tensor:
        y = fused_linear_swiglu(**first)
        return fused_linear_swiglu(y[:, :3584], second["weight"])

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for _ in range(3):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("rows", [100, 700])
def test_rows_that_stand_apart(rows):
    x, weight = make(rows, torch.bfloat16).values()
    apart = torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, : x.shape[1]]
    wide = torch.cat([weight, torch.full_like(weight[:, :64], torch.nan)], dim=1)[:, : x.shape[1]]
    assert torch.equal(checked(apart, wide), checked(x, weight))
