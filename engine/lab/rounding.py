"""Kernels that round once more than others: what the dtype itself does to a model's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...kernels.kernel_set import KernelSet

SHARE = 1 / 12
"""Rounding errs evenly by up to half a unit in the last place: ulp²/12 in the mean square. So does one unit more or
less in this share of the elements."""


def rounded_once_more(kernels: KernelSet, seed: int = 0) -> KernelSet:
    """The same kernels, each floating-point tensor that they return with the error of one more rounding to its dtype.

    In float32 a kernel's sums round as well, which in the shorter dtypes is lost: there a normal error of eps/2 · rms
    is added. SmolLM2's logits then move by about as much as between oneDNN's products and PyTorch's.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def wrap(op: str, function: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            returned = function(*arguments, **options)
            if isinstance(returned, (tuple, list)):
                return type(returned)(map(noisy, returned))
            return noisy(returned)

        return call

    def noisy(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        if x.device not in generators:
            generators[x.device] = torch.Generator(x.device).manual_seed(seed)
        return one_rounding(x, generators[x.device])

    return kernels.wrapped(wrap)


def one_rounding(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """x, a share of its elements moved by a unit in the last place, up or down; in 16 bits zeros and what is not finite
    stay."""
    if x.element_size() >= 4 and x.numel():
        size = torch.where(x.isfinite(), x, 0).square().mean().sqrt() * (torch.finfo(x.dtype).eps / 2)
        x = x + size * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    chance = torch.rand(x.shape, device=x.device, generator=generator)
    up, down = chance < SHARE / 2, chance >= 1 - SHARE / 2
    bits = x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    moved = (bits + up.to(bits.dtype) - down.to(bits.dtype)).view(x.dtype)
    return torch.where(x.isfinite() & (x != 0), moved, x)
