"""Decode attention: one query token a sequence, over a paged cache (Kwon et al. 2023, arXiv:2309.06180, eq. 4)."""

from __future__ import annotations

import torch

from .op import Op


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """y = softmax(scale · q Kᵀ) V for each sequence and head, K and V being the sequence's first context_len rows.

    q [batch, heads, head_dim]; k_cache, v_cache [blocks, block_size, kv_heads, head_dim]; block_table [batch,
    max_blocks] int32, entries past the context may be anything; context_lens [batch] int32, 0 for a padded row
    → [batch, heads, head_dim] in q's dtype, zeros for a padded row. Query head h reads KV head h // (heads/kv_heads).
    """
    batch, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    longest = max(1, int(context_lens.max()))
    # Rows past a context gather its last row again, so that nothing outside the context is ever read.
    position = torch.arange(longest, device=q.device).expand(batch, -1)
    valid = position < context_lens.unsqueeze(1)
    position = torch.minimum(position, (context_lens.unsqueeze(1) - 1).clamp(min=0))
    block = block_table.gather(1, position // block_size).long()
    block = torch.where(context_lens.unsqueeze(1) > 0, block, 0)
    offset = position % block_size

    wide = torch.promote_types(q.dtype, torch.float32)
    k = k_cache[block, offset].to(wide)  # [batch, longest, kv_heads, head_dim]
    v = v_cache[block, offset].to(wide)
    grouped = q.to(wide).view(batch, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("bkgd,btkd->bkgt", grouped, k) * scale
    scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    out = torch.einsum("bkgt,btkd->bkgd", weights, v).reshape(batch, heads, head_dim)
    return torch.where(context_lens[:, None, None] > 0, out, 0).to(q.dtype)


OP = Op("paged_attention", reference=paged_attention_reference)
