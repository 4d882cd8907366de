"""What flash-attn 2 needs and does not take; its adapters stand with the operators they compute."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def needs_flash_attn(device: torch.device) -> str | None:
    """Why flash-attn cannot run on `device`, None where it can."""
    if device.type != "cuda":
        return "flash-attn needs a CUDA GPU"
    return None if find_spec("flash_attn") else "flash-attn is not installed (pip install micro-vllm[flash])"


def refused_by_flash_attn(q: torch.Tensor, k_cache: torch.Tensor, instead: str) -> str | None:
    """Why flash-attn does not take these queries and this paged cache, and what to use instead; None where it does."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn computes in float16 and bfloat16, not in {q.dtype}: choose one of these, or {instead}"
    if k_cache.dtype != q.dtype:
        return f"flash-attn wants the cache in q's dtype {q.dtype}, not in {k_cache.dtype}: use {instead}"
    if k_cache.shape[1] % 256:
        return (
            f"flash-attn pages in multiples of 256 tokens, and the cache's block size is {k_cache.shape[1]}: use "
            f"block_size=256, or {instead}"
        )
    return None
