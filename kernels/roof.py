"""The roof (Williams et al. 2009, doi:10.1145/1498765.1498785): what a GPU does at best, as measured on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl

from .op import Cost
from .timing import graph_time


@dataclass(frozen=True)
class Roof:
    """What a GPU does at best.

    read, copy:  bytes/s, of a copy those read and those written together
    flops:       FLOP/s of a bfloat16 product
    launch:      seconds of an empty kernel in a graph
    """

    read: float
    copy: float
    flops: float
    launch: float

    @property
    def write(self) -> float:
        """Bytes/s written: what a copy's time leaves when the reads have taken theirs."""
        return 1 / (2 / self.copy - 1 / self.read)

    def memory_time(self, cost: Cost) -> float:
        return cost.read / self.read + cost.written / self.write

    def time(self, cost: Cost) -> float:
        """Seconds that no call of this cost beats. What a call must do beside it, a launch at least, is not in it."""
        return max(self.memory_time(cost), cost.flops / self.flops)


@cache
def measure_roof(device: torch.device) -> Roof:
    """The roof of this GPU, measured once a process: the best of a few plain kernels each, over arrays of 2 GiB."""

    def best(*candidates: Callable[[], Any]) -> float:
        """Seconds a call of the fastest."""
        return min(graph_time([call] * 2, replays=25).median for call in candidates) * 1e-6

    # The product goes first: it takes the GPU out of its idle clocks.
    n = 8192
    a, b, c = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(3))
    flops = 2 * n**3 / best(partial(torch.matmul, a, b, out=c))
    del a, b, c

    x = torch.randn(1 << 29, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    shapes = ((1024, 4, 4), (2048, 4, 4), (4096, 4, 8), (8192, 2, 8))  # elements a step, steps, warps

    def launch(kernel: Any, block: int, steps: int, warps: int) -> Callable[[], Any]:
        return lambda: kernel[(x.numel() // (block * steps),)](x, y, BLOCK=block, STEPS=steps, num_warps=warps)

    read = x.nbytes / best(*(launch(_read_kernel, *shape) for shape in shapes))
    copied = 2 * x.nbytes / best(partial(y.copy_, x), *(launch(_copy_kernel, *shape) for shape in shapes))
    empty = graph_time([lambda: _empty_kernel[(1,)](x)] * 256).median * 1e-6
    return Roof(read, copied, flops, empty)


@triton.jit
def _read_kernel(x_ptr, sums_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """sums[i] = Σ x over program i's BLOCK · STEPS elements: four bytes written for thousands read."""
    x_ptr += tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    total = tl.zeros([BLOCK], tl.float32)
    for step in tl.static_range(STEPS):
        total += tl.load(x_ptr + step * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    for step in tl.static_range(STEPS):
        place = start + step * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + place, tl.load(x_ptr + place))


@triton.jit
def _empty_kernel(x_ptr):
    pass
