"""The product for few rows: each launch gives the same function, and what is large goes to cuBLAS."""

from __future__ import annotations

import pytest
import torch
import triton
from microvllm.kernels import linear
from microvllm.kernels.op import Case

CASE = Case(rows=19, outputs=200, inputs=1160, bias=True)


@pytest.mark.parametrize(
    "rows, outputs, inputs",
    [
        (8, 3584, 18944),
        (8, 4608, 3584),
        (8, 37888, 3584),
        (35, 3584, 18944),
        (128, 3584, 18944),
        (35, 4608, 3584),
        (35, 37888, 3584),
        (35, 152064, 3584),
        (35, 151936, 896),
        (128, 896, 4864),
    ],
)
def test_every_launch_gives_the_same_function(monkeypatch, rows, outputs, inputs):
    launch = linear._few_rows_launch(rows, outputs, inputs, h200=False)
    monkeypatch.setattr(linear, "_few_rows_launch", lambda *sizes: launch)
    monkeypatch.setattr(linear, "_is_skinny", lambda *arguments: True)  # of float32 too, the stricter judge
    report = linear.OP.check("skinny", [CASE], dtypes=[torch.float16, torch.float32])
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("h200", [False, True])
@pytest.mark.parametrize("outputs, inputs", [(3584, 3584), (3584, 18944), (152064, 3584)])
def test_every_launch_for_one_row_gives_the_same_function(monkeypatch, outputs, inputs, h200):
    launch = linear._one_row_launch(outputs, inputs, h200)
    monkeypatch.setattr(linear, "_one_row_launch", lambda *sizes: launch)
    report = linear.OP.check("skinny", [Case(rows=1, outputs=11, inputs=1160, bias=True)], dtypes=[torch.float32])
    assert report.ok, f"\n{report}"


def test_no_launch_has_more_splits_than_steps():
    for rows in (2, 16, 17, 35, 64, 128):
        for outputs in (64, 1152, 3584, 4608, 152064):
            for inputs in (64, 896, 18944):
                launch = linear._few_rows_launch(rows, outputs, inputs, h200=False)
                assert launch is None or 1 <= launch["SPLITS"] <= max(1, inputs // launch["BLOCK_IN"])


def test_every_launch_fits_the_shared_memory_of_a_multiprocessor():
    """227 KiB on Hopper, for which Triton holds STAGES tiles of each operand."""
    kib = []
    for rows in (2, 16, 17, 32, 33, 40, 41, 64, 65, 128):
        for outputs in (64, 896, 1152, 3584, 4608, 9728, 10240, 37888, 152064):
            for inputs in (896, 3584, 4864, 18944):
                if launch := linear._few_rows_launch(rows, outputs, inputs, h200=False):
                    tile = (max(16, triton.next_power_of_2(rows)) + launch["BLOCK_OUT"]) * launch["BLOCK_IN"]
                    kib.append(launch["STAGES"] * tile * torch.bfloat16.itemsize / 1024)
    assert 128 < max(kib) <= 227


@pytest.mark.parametrize("rows, outputs, inputs", [(35, 151936, 896), (128, 896, 896), (128, 896, 4864)])
def test_what_an_h200_has_not_tried_it_leaves_to_cublas(rows, outputs, inputs):
    assert linear._few_rows_launch(rows, outputs, inputs, h200=False)
    assert linear._few_rows_launch(rows, outputs, inputs, h200=True) is None


def test_an_h200_leaves_the_most_rows_to_cublas():
    for h200, most in ((False, linear.SKINNY_ROWS), (True, 112)):
        ours = [rows for rows in range(2, 129) if linear._few_rows_launch(rows, 3584, 18944, h200)]
        assert ours == list(range(2, most + 1))


def test_the_products_behind_attention_and_behind_gate_and_up_ask_for_a_carve_out(monkeypatch):
    asked = []
    monkeypatch.setattr(linear, "prefer_carve_out", lambda kernel, percent: asked.append(percent))
    for inputs, outputs in ((3584, 2052), (8192, 3), (3584, 3)):
        linear.skinny_linear(torch.zeros(1, inputs), torch.zeros(outputs, inputs))
    assert asked == [14, 14, None]


@pytest.mark.parametrize(
    "x, weight, words",
    [
        (torch.zeros(2, 8), torch.zeros(4, 9), r"x is \[2, 8\] and weight \[4, 9\]"),
        (torch.zeros(8), torch.zeros(4, 8), r"x is \[8\]"),
        (torch.zeros(2, 8).half(), torch.zeros(4, 8), "x is torch.float16 and weight torch.float32"),
    ],
)
def test_what_does_not_fit_is_named(x, weight, words):
    with pytest.raises(ValueError, match=words):
        linear.skinny_linear(x, weight)
