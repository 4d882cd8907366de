"""Every operator, implementation and case through `Op.check` on the CPU, Triton's kernels through its interpreter.

What needs another package or a GPU of its own kind is in tests/gpu.
"""

from __future__ import annotations

import os

import pytest
import torch
from microvllm.kernels.op import REFERENCE, Cost, Op, needs_gpu

from .operators import OPERATORS

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def runs_here(op: Op, name: str) -> bool:
    if name != REFERENCE and op.implementations[name].unavailable is needs_gpu:
        return INTERPRETED
    return op.unavailable(name, CPU) is None


def every_case():
    for op in OPERATORS.values():
        for name in (REFERENCE, *op.implementations):
            for case in op.cases if runs_here(op, name) else ():
                yield pytest.param(op, name, case, id=f"{op.name}-{name}-{case}")


@pytest.mark.parametrize("op, name, case", list(every_case()))
def test_every_implementation_is_right(op, name, case, few_programs):
    dtypes = [dtype for dtype in (torch.float16, torch.float32) if dtype in op.dtypes]
    report = op.check(name, [case], dtypes=dtypes + [torch.float64] * (name == REFERENCE), device=CPU)
    if all(result.refused for result in report.results):
        pytest.skip(report.results[0].verdict)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
def test_every_operator_has_inputs_cases_and_a_cost(op):
    assert op.inputs is not None and op.cases and op.large_cases
    for case in op.cases + op.large_cases:
        half, single = (op.cost(**case.sizes, itemsize=itemsize) for itemsize in (2, 4))
        assert isinstance(half, Cost)
        for name in ("read", "written", "flops"):
            assert 0 <= getattr(half, name) <= getattr(single, name) and isinstance(getattr(half, name), int)
    assert all(op.cost(**case.sizes, itemsize=2).read > 0 for case in op.large_cases)


@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
def test_no_implementation_refuses_every_case(op):
    for name, implementation in op.implementations.items():
        if implementation.refuses is not None:
            calls = [
                op.inputs(**case.sizes, dtype=dtype, device=CPU, generator=torch.Generator().manual_seed(0))
                for case in op.cases
                for dtype in op.dtypes
            ]
            assert any(implementation.refuses(**inputs) is None for inputs in calls), name


def test_kernels_are_interpreted_where_there_is_no_gpu():
    assert INTERPRETED or torch.cuda.is_available()
