"""A paged cache as the attention operators take it: what fits it, and a random one to try them on."""

from __future__ import annotations

import torch


def misfit(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """How queries [tokens, heads, head_dim] and a paged cache do not fit each other, in words; None where they do."""
    (_, heads, head_dim), (_, _, kv_heads, width) = q.shape, k_cache.shape
    if k_cache.shape != v_cache.shape:
        return f"k_cache is {list(k_cache.shape)} and v_cache {list(v_cache.shape)}"
    if width != head_dim:
        return f"q's head_dim is {head_dim}, the cache's {width}"
    if heads % kv_heads:
        return f"{heads} query heads do not divide among {kv_heads} KV heads"
    if not q.stride(2) == k_cache.stride(3) == v_cache.stride(3) == 1:
        return "the elements of a head must be contiguous"
    return None


def random_paged_cache(
    contexts: torch.Tensor,
    block_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random (k_cache, v_cache, block_table) for texts of these lengths, their blocks scattered.

    What no text holds is NaN, and table entries past a text are no block's. A text's newest value is the larger the
    longer the text, so that a kernel that forgets it is seen to be wrong at any length.
    """
    device = generator.device
    contexts = contexts.to(device)
    needed = (contexts + block_size - 1) // block_size
    widest = int(needed.max()) + 1
    blocks = int(needed.sum()) + 3
    used = torch.arange(widest, device=device) < needed.unsqueeze(1)
    table = torch.full((len(contexts), widest), 2**30, dtype=torch.int32, device=device)
    table[used] = torch.randperm(blocks, generator=generator, device=device)[: int(needed.sum())].int()

    in_text = torch.arange(widest * block_size, device=device) < contexts.unsqueeze(1)
    slots = (table.long().unsqueeze(2) * block_size + torch.arange(block_size, device=device)).flatten(1)
    empty = torch.ones(blocks * block_size, dtype=torch.bool, device=device)
    empty[slots[in_text]] = False
    newest = slots.gather(1, (contexts.long() - 1).clamp(min=0).unsqueeze(1)).squeeze(1)[contexts > 0]
    shape = (blocks * block_size, kv_heads, head_dim)
    k, v = (torch.randn(shape, generator=generator, device=device, dtype=_drawn(dtype)) for _ in range(2))
    v[newest] *= contexts[contexts > 0].sqrt().view(-1, 1, 1).to(v.dtype)
    k[empty] = v[empty] = torch.nan
    return (*(x.view(blocks, block_size, kv_heads, head_dim).to(dtype) for x in (k, v)), table)


def _drawn(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
