"""The Hopper kernel of gate, up and SwiGLU for a prefill in an emulator of what it runs on, which mistakes are seen
there, what it refuses, and who computes it then; tests/gpu checks what it computes on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from microvllm.kernels import hopper_prefill_linear_swiglu, linear_swiglu
from microvllm.kernels.hopper_prefill_linear_swiglu import keeps_busy, refused_by_hopper_prefill
from microvllm.kernels.linear_swiglu import HOPPER_PREFILL_FROM, OP, fused_linear_swiglu
from microvllm.kernels.op import Case

from .gluon_emulator import emulate, half, plant, pretend_hopper

CASES = [
    Case(tokens=300, intermediate=264, inputs=320),  # nine tiles for three programs, a step more than there are stages
    Case(tokens=128, intermediate=512, inputs=64),  # whole tiles, fewer steps than stages
    Case(tokens=2100, intermediate=136, inputs=64),  # a second group, of one tile
]


def checked(module, monkeypatch, case: Case):
    """By three programs at most."""
    emulate(monkeypatch, module, multiprocessors=3)
    return OP.check(module.hopper_prefill_linear_swiglu, [case], dtypes=[torch.float16], device="cpu")


class TestInTheEmulator:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_it_is_as_right_as_the_reference(self, monkeypatch, case):
        report = checked(hopper_prefill_linear_swiglu, monkeypatch, case)
        assert report.ok, f"\n{report}"

    @pytest.mark.parametrize(
        "right, wrong, problem",
        [
            pytest.param(
                "warpgroup_mma_wait(1", "warpgroup_mma_wait(2", "NaN", id="a stage given back before it is read"
            ),
            pytest.param(
                "mbarrier.wait(empty.index(stage), phase)", "pass", "raised", id="a stage filled that is not free"
            ),
            pytest.param(
                "[intermediate + n * GATES, step * STEP]", "[n * GATES, step * STEP]", "wrong values", id="another's up"
            ),
            pytest.param(
                "tma.store_wait(0)\n        y_smem", "y_smem", "wrong values", id="a tile overwritten on its way out"
            ),
            pytest.param(
                "tiles_m - group * GROUP, GROUP", "GROUP, GROUP", "unwritten output", id="a last group too tall"
            ),
        ],
    )
    def test_it_sees_a_mistake(self, monkeypatch, tmp_path, right, wrong, problem):
        planted = plant(right, wrong, hopper_prefill_linear_swiglu, tmp_path)
        seen = [checked(planted, monkeypatch, case).problems for case in CASES]
        assert problem in set().union(*seen)


@pytest.fixture
def hopper(monkeypatch):
    pretend_hopper(monkeypatch, hopper_prefill_linear_swiglu)


WEIGHT = half(2 * 18944, 64)


def test_what_it_takes(hopper):
    for dtype in (torch.float16, torch.bfloat16):
        assert refused_by_hopper_prefill(half(2048, 64).to(dtype), WEIGHT.to(dtype)) is None


@pytest.mark.parametrize(
    "x, weight, words",
    [
        (half(0, 64), WEIGHT, "0 tokens of 18944 columns do not keep 132 multiprocessors busy"),
        (half(2048, 64), half(0, 64), "2048 tokens of 0 columns do not keep 132 multiprocessors busy"),
        (half(2048, 72), half(2 * 18944, 72), "multiples of 64, not 72"),
        (half(2048, 64), half(2 * 18940, 64), "columns in multiples of 8, not 18940"),
        (half(2048, 64).float(), WEIGHT, "float16 and bfloat16, not in torch.float32"),
        (half(2048, 68)[:, 4:], WEIGHT, "aligned to 16 bytes"),
    ],
)
def test_what_it_refuses(hopper, x, weight, words):
    assert words in refused_by_hopper_prefill(x, weight)


def test_what_is_no_hopper_gpu_is_refused():
    assert "compute capability 9.0, not for cpu" in refused_by_hopper_prefill(half(2048, 64), WEIGHT)


@pytest.mark.parametrize(
    "rows, intermediate, busy",
    [
        (640, 18944, True),  # Qwen2-7B: 740 tiles in 6 turns of 132
        (641, 18944, False),  # 888 in 7, and one row of 128 in the last
        (1024, 18944, True),
        (1024, 13824, True),  # 864 in 7
        (640, 13824, False),  # 540 in 5
        (2048, 4864, True),  # Qwen2-0.5B: 608 in 5
        (1024, 4864, False),  # 304 in 3
    ],
)
def test_multiprocessors_that_would_idle(rows, intermediate, busy):
    assert keeps_busy(rows, intermediate, 132) == busy


@pytest.mark.parametrize(
    "rows, columns, it", [(HOPPER_PREFILL_FROM, 18944, True), (HOPPER_PREFILL_FROM - 1, 18944, False), (641, 64, False)]
)
def test_it_computes_what_it_takes(hopper, monkeypatch, rows, columns, it):
    monkeypatch.setattr(linear_swiglu, "hopper_prefill_linear_swiglu", lambda x, weight: "it")
    monkeypatch.setattr(linear_swiglu, "skinny_linear", lambda x, weight: "cuBLAS")
    monkeypatch.setattr(linear_swiglu, "swiglu", lambda gate_up: f"{gate_up}, SwiGLU")
    assert fused_linear_swiglu(half(rows, 64), half(2 * columns, 64)) == ("it" if it else "cuBLAS, SwiGLU")
