"""The Hopper kernel of gate, up and SwiGLU in an emulator of what it runs on, which mistakes are seen there, what it
refuses, and who computes it then; tests/gpu checks what it computes on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from microvllm.kernels import hopper_linear_swiglu, hopper_prefill_linear_swiglu, linear_swiglu
from microvllm.kernels.hopper_linear_swiglu import MOST_ROWS, keeps_busy, refused_by_hopper
from microvllm.kernels.linear import skinny_linear
from microvllm.kernels.linear_swiglu import OP, fused_linear_swiglu
from microvllm.kernels.op import Case
from microvllm.kernels.swiglu import swiglu

from .gluon_emulator import emulate, half, plant, pretend_hopper
from .gpu.sanitize import LARGER

CASES = [
    Case(tokens=70, intermediate=145, inputs=512),  # two tiles of the weight, one column in the last
    Case(tokens=128, intermediate=576, inputs=512),  # whole tiles, one program has two of the four
    Case(tokens=17, intermediate=300, inputs=576),  # a step more than there are stages; five tiles
]


def checked(module, monkeypatch, case: Case):
    """By three programs at most."""
    emulate(monkeypatch, module, multiprocessors=3)
    return OP.check(module.hopper_linear_swiglu, [case], dtypes=[torch.float16], device="cpu")


class TestInTheEmulator:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_it_is_as_right_as_the_reference(self, monkeypatch, case):
        report = checked(hopper_linear_swiglu, monkeypatch, case)
        assert report.ok, f"\n{report}"

    @pytest.mark.parametrize(
        "right, wrong, problem",
        [
            pytest.param(
                "warpgroup_mma_wait(2", "warpgroup_mma_wait(4", "NaN", id="a stage given back before it is read"
            ),
            pytest.param(
                "mbarrier.wait(empty.index(stage), phase)", "pass", "raised", id="a stage filled that is not free"
            ),
            pytest.param(
                "[intermediate + gate + WIDE, column]",
                "[intermediate + gate, column]",
                "wrong values",
                id="another's up",
            ),
            pytest.param(" & (column < intermediate)[None, :]", "", "raised", id="more columns than there are"),
        ],
    )
    def test_it_sees_a_mistake(self, monkeypatch, tmp_path, right, wrong, problem):
        planted = plant(right, wrong, hopper_linear_swiglu, tmp_path)
        seen = [checked(planted, monkeypatch, case).problems for case in CASES]
        assert problem in set().union(*seen)


@pytest.fixture
def hopper(monkeypatch):
    pretend_hopper(monkeypatch, hopper_linear_swiglu)


WEIGHT = half(2 * 18944, 512)


@pytest.mark.parametrize("rows", [1, 128])
def test_what_it_takes(hopper, rows):
    for dtype in (torch.float16, torch.bfloat16):
        assert refused_by_hopper(half(rows, 512).to(dtype), WEIGHT.to(dtype)) is None


@pytest.mark.parametrize("case", LARGER["linear_swiglu"], ids=str)
def test_it_or_the_one_for_a_prefill_computes_what_the_sanitizer_watches_for_its_sake(hopper, monkeypatch, case):
    pretend_hopper(monkeypatch, hopper_prefill_linear_swiglu)
    tokens, intermediate, inputs = case.sizes.values()
    it = "hopper_linear_swiglu" if tokens <= MOST_ROWS else "hopper_prefill_linear_swiglu"
    monkeypatch.setattr(linear_swiglu, it, lambda x, weight: it)
    assert fused_linear_swiglu(half(tokens, inputs), half(2 * intermediate, inputs)) == it


@pytest.mark.parametrize(
    "x, weight, words",
    [
        (half(0, 512), WEIGHT, "1 to 128 tokens, not 0"),
        (half(129, 512), WEIGHT, "1 to 128 tokens, not 129"),
        (half(65, 512).float(), WEIGHT, "float16 and bfloat16, not in torch.float32"),
        (half(65, 512), WEIGHT.bfloat16(), "not in torch.float16 and torch.bfloat16"),
        (half(65, 448), WEIGHT[:, :448], "multiples of 64 from 512 on, not 448"),
        (half(65, 520), half(2 * 18944, 520), "multiples of 64 from 512 on, not 520"),
        (half(65, 516)[:, :512], WEIGHT, "aligned to 16 bytes"),
        (half(65, 520)[:, 4:516], WEIGHT, "aligned to 16 bytes"),
        (half(512, 65).t(), WEIGHT, "contiguous"),
        (half(65, 512), half(2 * 4864, 512), "4864 columns do not keep 132 multiprocessors busy"),
        (half(65, 512), half(0, 512), "busy"),
    ],
)
def test_what_it_refuses(hopper, x, weight, words):
    assert words in refused_by_hopper(x, weight)


def test_what_is_no_hopper_gpu_is_refused():
    assert "compute capability 9.0, not for cpu" in refused_by_hopper(half(65, 512), WEIGHT)


@pytest.mark.parametrize(
    "rows, intermediate, multiprocessors, busy",
    [
        (128, 18944, 132, True),  # Qwen2-7B on an H100: 132 tiles
        (128, 18944, 114, False),  # on an H100 PCIe: a second turn for 18 of them
        (64, 18944, 132, True),  # 264
        (64, 18944, 114, False),  # a third turn for 36
        (128, 17408, 132, True),  # Qwen3-14B: 121
        (128, 14336, 132, False),  # Llama 3 8B: 100
        (128, 27648, 132, False),  # Qwen2.5-32B: 192, one turn and a half
        (64, 27648, 132, True),  # 384
        (128, 4864, 132, False),  # Qwen2-0.5B: 34
    ],
)
def test_multiprocessors_that_would_idle(rows, intermediate, multiprocessors, busy):
    assert keeps_busy(rows, intermediate, multiprocessors) == busy


@pytest.mark.parametrize("rows", [65, 128])
def test_the_unfused_kernels_compute_what_it_refuses(rows):
    x, weight = (torch.randn(n, 40, generator=torch.Generator().manual_seed(n)) for n in (rows, 2 * 7))
    assert torch.equal(fused_linear_swiglu(x, weight), swiglu(skinny_linear(x, weight)))


@pytest.mark.parametrize("rows", [33, 64, 65, 128])
def test_it_computes_what_it_takes(hopper, monkeypatch, rows):
    monkeypatch.setattr(linear_swiglu, "hopper_linear_swiglu", lambda x, weight: (x, weight))
    x = half(rows, 512)
    assert fused_linear_swiglu(x, WEIGHT) == (x, WEIGHT)
