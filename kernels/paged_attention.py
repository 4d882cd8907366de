"""Decode attention: one query token a sequence, over a paged cache (Kwon et al. 2023, arXiv:2309.06180, eq. 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

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
    lengths = context_lens.unsqueeze(1)
    longest = max(1, int(context_lens.max()))
    seen = torch.arange(longest, device=q.device) < lengths  # [batch, longest]

    slots = block_table.unsqueeze(2) * block_size + torch.arange(block_size, device=q.device)
    slots = slots.flatten(1)[:, :longest]
    # Past its context a row gathers its first token again: nothing outside a context is ever read, masked or not.
    slots = torch.where(seen, slots, slots[:, :1])
    slots = torch.where(lengths > 0, slots, 0).flatten()
    k = k_cache.flatten(0, 1).index_select(0, slots).view(batch, longest, kv_heads, head_dim)
    v = v_cache.flatten(0, 1).index_select(0, slots).view(batch, longest, kv_heads, head_dim)

    # The query heads of a KV head are rows of one product.
    grouped = q.view(batch, kv_heads, heads // kv_heads, head_dim)
    y = F.scaled_dot_product_attention(
        grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen[:, None, None], scale=scale
    )
    return torch.where(lengths.unsqueeze(2) > 0, y.reshape_as(q), 0)


OP = Op("paged_attention", reference=paged_attention_reference)
