"""SwiGLU (Shazeer 2020, arXiv:2002.05202, eq. 6), after the two products: silu(gate) · up."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .op import Op


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """y = silu(gate) · up, where gate and up are the halves of the last dimension.

    gate_up [tokens, 2·intermediate] → [tokens, intermediate]
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


OP = Op("swiglu", reference=swiglu_reference)
