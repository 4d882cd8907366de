"""The carve-out that kernels ask for, read back from the driver."""

from __future__ import annotations

import ctypes

import pytest
import torch
import triton
import triton.language as tl
from microvllm.kernels.carve_out import PREFERRED_CARVE_OUT, prefer_carve_out


@triton.jit
def _one(y_ptr):
    tl.store(y_ptr, 1.0)


def asked_for(kernel) -> int:
    value = ctypes.c_int()
    function = ctypes.c_void_p(kernel.function)
    assert ctypes.CDLL("libcuda.so.1").cuFuncGetAttribute(ctypes.byref(value), PREFERRED_CARVE_OUT, function) == 0
    return value.value


def test_it_is_what_was_last_preferred():
    y = torch.zeros(1, device="cuda")
    kernel = _one[(1,)](y)
    for percent in (14, 44):
        prefer_carve_out(kernel, percent)
        prefer_carve_out(kernel, None)
        assert asked_for(kernel) == percent
    _one[(1,)](y.zero_())
    assert y.item() == 1


def test_a_share_over_all_is_refused_and_changes_nothing():
    kernel = _one[(1,)](torch.zeros(1, device="cuda"))
    prefer_carve_out(kernel, 28)
    with pytest.raises(RuntimeError, match="refuses a carve-out of 101 %: CUDA error 1"):
        prefer_carve_out(kernel, 101)
    assert asked_for(kernel) == 28


def test_it_may_be_preferred_while_a_graph_is_captured():
    y, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    _one[(1,)](y)
    with torch.cuda.graph(graph):
        prefer_carve_out(_one[(1,)](y), 14)
    y.zero_()
    graph.replay()
    assert y.item() == 1
