"""The matrix product of every projection: y = x Wᵀ + b."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .op import Implementation, Op


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x Wᵀ + b.   x [tokens, in], weight [out, in], bias [out] or None → [tokens, out]"""
    return F.linear(x, weight, bias)


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `linear_reference`, by oneDNN on a CPU, with a weight from `onednn_prepare`.

    MKL, which `F.linear` calls, is slow for few rows on processors that are not Intel's. What that costs shows beside
    transformers, which calls it: `python -m bench.engine --peer transformers`.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn_prepare(weight: torch.Tensor) -> torch.Tensor:
    """The weight [out, in] in oneDNN's blocked layout; ValueError for a dtype but float32 and bfloat16."""
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"oneDNN multiplies float32 and bfloat16 on a CPU, not {weight.dtype}: choose one of these, or "
            "kernels=KernelSet.default().replace(linear='reference')"
        )
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def _needs_onednn(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it is for a CPU"
    return None if torch.backends.mkldnn.is_available() else "this PyTorch is built without oneDNN"


OP = Op(
    "linear",
    reference=linear_reference,
    implementations={"onednn": Implementation(onednn_linear, _needs_onednn, onednn_prepare)},
)
