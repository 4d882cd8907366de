"""The fused operators: each launch gives the same function, and what does not fit is named."""

from __future__ import annotations

import pytest
import torch
from microvllm.kernels import norm_gate_up_swiglu, norm_linear
from microvllm.kernels.linear_add import skinny_linear_add
from microvllm.kernels.op import Case

X, WEIGHT, NORM = torch.ones(1, 8), torch.ones(6, 8), torch.ones(8)


@pytest.mark.parametrize("outputs, inputs", [(4608, 3584), (1152, 896)])
@pytest.mark.parametrize(
    "module, sizes",
    [(norm_linear, {"outputs": 11, "bias": True}), (norm_gate_up_swiglu, {"intermediate": 11})],
    ids=["norm_linear", "norm_gate_up_swiglu"],
)
def test_every_launch_gives_the_same_function(monkeypatch, module, sizes, outputs, inputs):
    launch = module._launch(outputs, inputs)
    monkeypatch.setattr(module, "_launch", lambda *sizes: launch)
    cases = [Case(tokens=1, inputs=inputs, **sizes) for inputs in (37, 1160, 2048)]
    report = module.OP.check("triton", cases, dtypes=[torch.float32])
    assert report.ok, f"\n{report}"


def test_a_residual_of_any_strides_is_added():
    residual = torch.randn(6, 3).t()
    x = torch.randn(3, 8)
    torch.testing.assert_close(skinny_linear_add(x, WEIGHT, residual), residual + x @ WEIGHT.t())


def test_a_norm_of_large_numbers_does_not_overflow():
    x = torch.full((1, 8), 6e4, dtype=torch.float16)  # neither its square nor the product is a float16
    y = norm_linear.norm_linear(x, NORM.half(), 1e-6, WEIGHT.half())
    assert y.tolist() == [[8.0] * 6]


@pytest.mark.parametrize("function", [norm_linear.norm_linear, norm_gate_up_swiglu.norm_gate_up_swiglu])
@pytest.mark.parametrize(
    "x, norm_weight, weight, words",
    [
        (torch.ones(2, 8), NORM, WEIGHT, "it is for one token, not 2"),
        (X, NORM, torch.ones(6, 9), r"x is \[1, 8\] and weight \[6, 9\]"),
        (X, torch.ones(9), WEIGHT, r"norm_weight is \[9\] in torch.float32, and x \[1, 8\] in torch.float32"),
        (X, NORM.half(), WEIGHT, "norm_weight is .* in torch.float16"),
        (X.double(), NORM.double(), WEIGHT.double(), "float16, bfloat16 or float32, not torch.float64"),
        (X, NORM, torch.ones(8, 6).t(), "contiguous"),
    ],
)
def test_what_does_not_fit_is_named(function, x, norm_weight, weight, words):
    with pytest.raises(ValueError, match=f"^{function.__name__}: .*{words}"):
        function(x, norm_weight, 1e-6, weight)


def test_gates_and_ups_are_as_many():
    with pytest.raises(ValueError, match=r"weight is \[2·intermediate, in\], not \[5, 8\]"):
        norm_gate_up_swiglu.norm_gate_up_swiglu(X, NORM, 1e-6, torch.ones(5, 8))


@pytest.mark.parametrize("residual", [torch.zeros(1, 5), torch.zeros(1, 6).half()])
def test_a_residual_that_does_not_fit_is_named(residual):
    words = rf"residual is \[1, {residual.shape[1]}\] in {residual.dtype}, and x Wᵀ \[1, 6\] in torch.float32"
    with pytest.raises(ValueError, match=words):
        skinny_linear_add(X, WEIGHT, residual)
