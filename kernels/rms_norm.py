"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4), alone and with the residual added first."""

from __future__ import annotations

import torch

from .op import Op


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = x / sqrt(mean(x², dim=-1) + eps) · weight, the quotient computed in float32 at least.

    x [..., hidden], weight [hidden] → [..., hidden] in x's dtype
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(s), s) with s = x + residual, the residual stream.

    x, residual [tokens, hidden], weight [hidden] → two of [tokens, hidden]
    """
    residual = x + residual
    return rms_norm_reference(residual, weight, eps), residual


OP = Op("rms_norm", reference=rms_norm_reference)
ADD_OP = Op("add_rms_norm", reference=add_rms_norm_reference)
