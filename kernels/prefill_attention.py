"""Prefill attention: a ragged batch of prompt chunks, each causal over all that its sequence has in the paged cache."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F

from .op import Implementation, Op


def prefill_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
) -> torch.Tensor:
    """y = softmax(scale · q Kᵀ + mask) V, where query i of n sees the first context_len − n + i + 1 rows of K and V.

    The chunk's own keys and values are in the cache already, behind those of a cached prefix and of earlier chunks.

    q [tokens, heads, head_dim], the chunks one behind the other; k_cache, v_cache [blocks, block_size, kv_heads,
    head_dim]; block_table [chunks, max_blocks] int32, entries past the context may be anything; query_start
    [chunks + 1] int32, cumulative; context_lens [chunks] int32, prefix and chunk together → as q
    """
    out = torch.empty_like(q)
    block_size = k_cache.shape[1]
    starts = query_start.tolist()
    for i, context in enumerate(context_lens.tolist()):
        start, end = starts[i], starts[i + 1]
        blocks = block_table[i, : -(-context // block_size)].long()
        k = k_cache[blocks].flatten(0, 1)[:context].transpose(0, 1)  # [kv_heads, context, head_dim]
        v = v_cache[blocks].flatten(0, 1)[:context].transpose(0, 1)
        seen = torch.arange(context - (end - start), context, device=q.device)
        mask = torch.arange(context, device=q.device) <= seen.unsqueeze(1)
        chunk = q[start:end].transpose(0, 1)
        y = F.scaled_dot_product_attention(chunk[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=True)
        out[start:end] = y[0].transpose(0, 1)
    return out


def flash_attn_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
) -> torch.Tensor:
    """flash-attn 2 (arXiv:2307.08691) through its block table; as `prefill_attention_reference`.

    ValueError where flash-attn cannot: block sizes that are no multiple of 256, dtypes but float16 and bfloat16.
    """
    from flash_attn import flash_attn_varlen_func

    if k_cache.shape[1] % 256:
        raise ValueError(
            f"flash-attn pages in multiples of 256 tokens, and the cache's block size is {k_cache.shape[1]}: use "
            "block_size=256, or kernels=KernelSet.default().replace(prefill_attention='reference')"
        )
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"flash-attn computes in float16 and bfloat16, not in {q.dtype}: choose one of these, or "
            "kernels=KernelSet.default().replace(prefill_attention='reference')"
        )
    context_start = F.pad(context_lens.cumsum(0, dtype=torch.int32), (1, 0))
    return flash_attn_varlen_func(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q=query_start,
        cu_seqlens_k=context_start,
        max_seqlen_q=max_query_len,
        max_seqlen_k=max_context_len,
        softmax_scale=scale,
        causal=True,
        block_table=block_table,
    )


def _needs_flash_attn(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "flash-attn needs a CUDA GPU"
    return None if find_spec("flash_attn") else "flash-attn is not installed (pip install micro-vllm[flash])"


OP = Op(
    "prefill_attention",
    reference=prefill_attention_reference,
    implementations={"flash_attn": Implementation(flash_attn_prefill, _needs_flash_attn)},
)
