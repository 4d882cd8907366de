"""torch.compile of a reference: what a user gets without a kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch


@cache
def compiled(reference: Callable, *, dynamic: bool = False) -> Callable:
    """The function through Inductor, as one graph. Each new set of shapes takes seconds; with `dynamic` most do not."""
    _leave_scans_to_pytorch()
    torch._dynamo.config.recompile_limit = 1 << 10  # past it dynamo raises, or runs a case uncompiled
    # With it Inductor folds a 64-bit constant into an index of 32 bits, and Triton refuses the sum (torch 2.11).
    options = {"constant_and_index_propagation": False}
    return torch.compile(reference, fullgraph=True, dynamic=dynamic, options=options)


@cache
def _leave_scans_to_pytorch() -> None:
    """Over a vocabulary, split among programs, Inductor fails to compile a cumsum (torch 2.11)."""
    from torch._inductor.lowering import make_fallback

    make_fallback(torch.ops.aten.cumsum)
