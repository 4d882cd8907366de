"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), on halves as GPT-NeoX pairs them."""

from __future__ import annotations

import torch

from .op import Op


def rotary_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the pairs (x[i], x[i + head_dim/2]) of each head by the angle of the token's position.

    q [tokens, heads, head_dim], k [tokens, kv_heads, head_dim], cos and sin [positions, head_dim/2] in float32,
    positions [tokens] → q and k rotated, in their dtype
    """
    cos = cos[positions].unsqueeze(1)
    sin = sin[positions].unsqueeze(1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


OP = Op("rotary", reference=rotary_reference)
