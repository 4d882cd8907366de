"""The write of new keys and values into the paged cache (Kwon et al. 2023, arXiv:2309.06180, section 4.3)."""

from __future__ import annotations

import torch

from .op import Op


def store_kv_reference(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """cache[slot // block_size, slot % block_size] = row, in place; a row whose slot is negative is written nowhere.

    k, v [tokens, kv_heads, head_dim]; k_cache, v_cache [blocks, block_size, kv_heads, head_dim];
    slot_mapping [tokens] int64, no slot twice
    """
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    block, offset = slots // k_cache.shape[1], slots % k_cache.shape[1]
    k_cache[block, offset] = k[written]
    v_cache[block, offset] = v[written]


OP = Op("store_kv", reference=store_kv_reference)
