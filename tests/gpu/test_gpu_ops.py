"""Every operator, implementation and case through `Op.check` on a GPU, at real sizes too, and in a CUDA graph."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from microvllm.kernels import append_attention
from microvllm.kernels.measure import default_dtype
from microvllm.kernels.op import Case, Op

from ..operators import OPERATORS

GPU = torch.device("cuda")


def dtypes_of(op: Op, case: Case) -> list[torch.dtype]:
    """All that the operator computes in; at real sizes float16 and bfloat16, unless it computes in neither."""
    halves = [dtype for dtype in op.dtypes if dtype in (torch.float16, torch.bfloat16)]
    return list(op.dtypes) if case in op.cases or not halves else halves


def every_implementation() -> list:
    return [
        pytest.param(op, name, id=f"{op.name}-{name}")
        for op in OPERATORS.values()
        for name in op.implementations
        if op.unavailable(name, GPU) is None
    ]


def every_case() -> list:
    return [
        pytest.param(*param.values, case, id=f"{param.id}-{case}")
        for param in every_implementation()
        for case in param.values[0].cases + param.values[0].large_cases
    ]


@cache
def flash_attn_has(head_dim: int) -> bool:
    """Whether this build of flash-attn has the head size: one made for a few sizes writes some columns of others."""
    from flash_attn import flash_attn_func

    v = torch.full((1, 16, 1, head_dim), 3, dtype=torch.float16, device=GPU)
    return v.equal(flash_attn_func(v, v, v))


def left_out(name: str, case: Case) -> str | None:
    """Why a case says nothing of an implementation."""
    if name == "flash_attn" and not flash_attn_has(case.sizes["head_dim"]):
        return f"this build of flash-attn has no kernel for head_dim={case.sizes['head_dim']}"
    return None


@pytest.mark.parametrize("op, name, case", every_case())
def test_every_implementation_is_right(op, name, case):
    if reason := left_out(name, case):
        pytest.skip(reason)
    if name == "flash_attn" and op is append_attention.OP:
        op = replace(op, inputs=with_angles_that_flash_attn_can_hold)
    report = op.check(name, [case], dtypes=dtypes_of(op, case), device=GPU)
    if all(result.refused for result in report.results):
        pytest.skip(report.results[0].verdict)
    if name == "flash_attn" and report.problems == {"written out of bounds"}:
        pytest.xfail(f"flash-attn writes past a tensor of its own; its results are right\n{report}")
    assert report.ok, f"\n{report}"


def with_angles_that_flash_attn_can_hold(*, dtype, **options) -> dict:
    """flash-attn takes cos and sin in q's dtype alone, and is judged by what it is given."""
    inputs = append_attention.OP.inputs(dtype=dtype, **options)
    return inputs | {name: inputs[name].to(dtype).float() for name in ("cos", "sin")}


def results(returned, inputs: dict, op: Op) -> list[torch.Tensor]:
    returned = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
    return [x.clone() for x in (*returned, *(inputs[name] for name in op.mutates))]


def first_inputs(op: Op, name: str) -> dict:
    """Those of the first small case that the implementation takes."""
    refuses = op.implementations[name].refuses
    for case in op.cases:
        generator = torch.Generator(GPU).manual_seed(0)
        inputs = op.inputs(**case.sizes, dtype=default_dtype(op), device=GPU, generator=generator)
        if left_out(name, case) is None and (refuses is None or refuses(**inputs) is None):
            return inputs
    pytest.skip("it takes none of the small cases")


@pytest.mark.parametrize("op, name", every_implementation())
def test_every_implementation_runs_in_a_captured_graph(op, name):
    implementation = op.implementations[name]
    inputs = first_inputs(op, name)
    if implementation.prepare is not None:
        inputs["weight"] = implementation.prepare(inputs["weight"])
    eager, captured = ({n: x.clone() if n in op.mutates else x for n, x in inputs.items()} for _ in range(2))
    expected = results(implementation.function(**eager), eager, op)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = implementation.function(**captured)
    graph.replay()
    for got, wanted in zip(results(returned, captured, op), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
