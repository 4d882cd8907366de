"""Kernels from elsewhere, as they are used where they come from: a few lines that hand each its arguments. A fused
operator's peer is our own kernels for its parts.

A peer that plans ahead plans in `bind`, outside the graph, as its engine does once a step for all layers. Each gets
what it needs to be fast; where it has several ways, they run under one name and the fastest is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from microvllm.kernels import (
    append_attention,
    hopper_prefill,
    linear_add,
    linear_add_norm,
    linear_swiglu,
    norm_gate_up_swiglu,
    norm_linear,
    norm_qkv_rotary_store_kv,
    prefill_attention,
    rms_norm,
    rotary,
    sampling,
    swiglu,
)
from microvllm.kernels.compiled import compiled
from microvllm.kernels.hopper import multiprocessors
from microvllm.kernels.kernel_set import KernelSet
from microvllm.kernels.measure import Peer
from microvllm.kernels.op import Op


def _installed(package: str) -> Callable[[], str | None]:
    return lambda: None if find_spec(package) else f"not installed ({package})"


def _refuses_cache(q: torch.Tensor, k_cache: torch.Tensor, pages: int = 1, **rest: Any) -> str | None:
    if k_cache.dtype != q.dtype or q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes no cache in {k_cache.dtype}"
    return f"pages in multiples of {pages} tokens" if k_cache.shape[1] % pages else None


def _blocks(block_table: torch.Tensor, k_cache: torch.Tensor) -> torch.Tensor:
    """The table with block 0 for entries that are none: some kernels load ahead of the context."""
    return block_table.masked_fill((block_table < 0) | (block_table >= k_cache.shape[0]), 0)


# Decode attention.


def _flash_attn_decode(*, q, k_cache, v_cache, block_table, context_lens, scale, **rest):
    from flash_attn import flash_attn_with_kvcache

    options = {"cache_seqlens": context_lens, "block_table": _blocks(block_table, k_cache), "softmax_scale": scale}
    queries = q.unsqueeze(1)
    return lambda: flash_attn_with_kvcache(queries, k_cache, v_cache, **options).squeeze(1)


def _fa3_decode(planned: bool, splits: int, *, q, k_cache, v_cache, block_table, context_lens, scale, **rest):
    """splits: 0 for its own rule; 32 at most is what vLLM captures."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    batch, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    longest = int(context_lens.max())
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    plan = None
    if planned:
        plan = get_scheduler_metadata(
            batch_size=batch,
            max_seqlen_q=1,
            max_seqlen_k=longest,
            num_heads_q=heads,
            num_heads_kv=kv_heads,
            headdim=head_dim,
            cache_seqlens=context_lens,
            qkv_dtype=q.dtype,
            cu_seqlens_q=starts,
            page_size=block_size,
            causal=True,
            num_splits=splits,
        )
    return partial(
        flash_attn_varlen_func,
        q,
        k_cache,
        v_cache,
        max_seqlen_q=1,
        cu_seqlens_q=starts,
        max_seqlen_k=longest,
        seqused_k=context_lens,
        block_table=_blocks(block_table, k_cache),
        softmax_scale=scale,
        causal=True,
        fa_version=3,
        scheduler_metadata=plan,
        num_splits=splits,
    )


def _vllm_triton_decode(*, q, k_cache, v_cache, block_table, context_lens, scale, **rest):
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    batch, heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    # As its backend has them: 16 parts a sequence, and none where 128 programs run anyway.
    parts, most_split = 16, 128 // kv_heads
    partial_shape = (most_split, heads, parts)
    float32 = {"dtype": torch.float32, "device": q.device}
    one = torch.ones(1, **float32).expand(batch, kv_heads)
    options = {
        "cu_seqlens_q": torch.arange(batch + 1, dtype=torch.int32, device=q.device),
        "max_seqlen_q": 1,
        "seqused_k": context_lens,
        "max_seqlen_k": int(context_lens.max()),
        "softmax_scale": scale,
        "causal": True,
        "window_size": (-1, -1),
        "block_table": _blocks(block_table, k_cache),
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": one,
        "v_descale": one,
        "seq_threshold_3D": most_split,
        "num_par_softmax_segments": parts,
        "softmax_segm_output": torch.empty(*partial_shape, 1 << (head_dim - 1).bit_length(), **float32),
        "softmax_segm_max": torch.empty(partial_shape, **float32),
        "softmax_segm_expsum": torch.empty(partial_shape, **float32),
    }

    def run() -> torch.Tensor:
        out = torch.empty_like(q)
        unified_attention(q, k_cache, v_cache, out, **options)
        return out

    return run


@cache
def _flashinfer_workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(512 << 20, dtype=torch.uint8, device=device)


@cache
def _build_flashinfer(dtype: torch.dtype) -> None:
    """Compiles its modules at once, which takes as long as one of them."""
    from flashinfer.jit import build_jit_specs, gen_batch_decode_module, gen_batch_prefill_module
    from flashinfer.jit.sampling import gen_sampling_module

    specs = [gen_sampling_module()]
    for head_dim in (64, 128):
        types = (dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, False, False)
        specs += [gen_batch_decode_module(*types), gen_batch_prefill_module("fa2", *types, False)]
    build_jit_specs(specs)


def _flashinfer_decode(tensor_cores: bool, *, q, k_cache, v_cache, block_table, context_lens, scale, **rest):
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    _build_flashinfer(q.dtype)
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = k_cache.shape[1:3]
    lengths = context_lens.cpu()
    pages = (lengths + block_size - 1) // block_size
    starts = F.pad(pages.cumsum(0, dtype=torch.int32), (1, 0))
    indices = block_table.cpu()[torch.arange(block_table.shape[1]) < pages.unsqueeze(1)]
    last = lengths - (pages - 1).clamp(min=0) * block_size
    wrapper = BatchDecodeWithPagedKVCacheWrapper(_flashinfer_workspace(q.device), "NHD", use_tensor_cores=tensor_cores)
    types = {"q_data_type": q.dtype, "kv_data_type": k_cache.dtype}
    wrapper.plan(starts, indices, last, heads, kv_heads, head_dim, block_size, sm_scale=scale, **types)
    return lambda: wrapper.run(q, (k_cache, v_cache))


def _flashinfer_refuses(*, q, k_cache, context_lens, **rest):
    if not bool((context_lens > 0).all()):
        return "takes no padded row"
    return _refuses_cache(q, k_cache)


def _cuda_cores_refuse(*, q, k_cache, context_lens, **rest):
    group = q.shape[1] // k_cache.shape[2]
    if group not in (1, 2, 3, 4, 8):
        return f"its CUDA-core kernel takes no {group} query heads a KV head"
    return _flashinfer_refuses(q=q, k_cache=k_cache, context_lens=context_lens)


def _flash_attn_append(
    *, q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping, block_table, context_lens, scale
):
    from flash_attn import flash_attn_with_kvcache

    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    options = {
        "rotary_cos": cos.to(q.dtype),
        "rotary_sin": sin.to(q.dtype),
        "cache_seqlens": context_lens - 1,
        "block_table": _blocks(block_table, k_cache),
        "softmax_scale": scale,
        "rotary_interleaved": False,
    }
    return lambda: flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, **options).squeeze(1)


# Prefill attention.


def _flash_attn_prefill(
    *, q, k_cache, v_cache, block_table, query_start, context_lens, max_query_len, max_context_len, scale, **rest
):
    from flash_attn import flash_attn_varlen_func

    return partial(
        flash_attn_varlen_func,
        q,
        k_cache,
        v_cache,
        cu_seqlens_q=query_start,
        cu_seqlens_k=F.pad(context_lens.cumsum(0, dtype=torch.int32), (1, 0)),
        max_seqlen_q=max_query_len,
        max_seqlen_k=max_context_len,
        softmax_scale=scale,
        causal=True,
        block_table=_blocks(block_table, k_cache),
    )


def _fa3_prefill(
    *, q, k_cache, v_cache, block_table, query_start, context_lens, max_query_len, max_context_len, scale, **rest
):
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return partial(
        flash_attn_varlen_func,
        q,
        k_cache,
        v_cache,
        max_seqlen_q=max_query_len,
        cu_seqlens_q=query_start,
        max_seqlen_k=max_context_len,
        seqused_k=context_lens,
        block_table=_blocks(block_table, k_cache),
        softmax_scale=scale,
        causal=True,
        fa_version=3,
    )


# The rest of a layer.


def _vllm_rms_norm(*, x, weight, eps):
    from vllm import _custom_ops as ops

    def run() -> torch.Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ops.rms_norm(out, x, weight, eps)
        return out

    return run


def _liger_rms_norm(*, x, weight, eps):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # The weight's offset, the casts of Llama's norm, and a result of its own.
    return partial(LigerRMSNormFunction.apply, x, weight, eps, 0.0, "llama", False)


def _vllm_add_rms_norm(*, x, residual, weight, eps):
    from vllm import _custom_ops as ops

    x, residual = x.clone(), residual.clone()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        ops.fused_add_rms_norm(x, residual, weight, eps)
        return x, residual

    return run


def _vllm_swiglu(*, gate_up):
    from vllm import _custom_ops  # noqa: F401  brings torch.ops._C

    def run() -> torch.Tensor:
        out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
        torch.ops._C.silu_and_mul(out, gate_up)
        return out

    return run


def _vllm_rotary(*, q, k, cos, sin, positions):
    from vllm import _custom_ops as ops

    q, k = q.clone(), k.clone()
    table = torch.cat((cos, sin), dim=-1).to(q.dtype)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        ops.rotary_embedding(positions, q, k, q.shape[-1], table, True)
        return q, k

    return run


def _vllm_rotary_store_kv(*, q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping):
    from vllm import _custom_ops as ops

    q, k = q.clone(), k.clone()
    table = torch.cat((cos, sin), dim=-1).to(q.dtype)
    one = torch.ones(1, dtype=torch.float32, device=k.device)

    def run() -> torch.Tensor:
        ops.rotary_embedding(positions, q, k, q.shape[-1], table, True)
        ops.reshape_and_cache_flash(k, v, k_cache, v_cache, slot_mapping, "auto", one, one)
        return q

    return run


def _bound(kernel: Callable) -> Callable[..., Callable[[], Any]]:
    """As a peer binds a kernel that takes what the operator's reference does."""
    return lambda **inputs: partial(kernel, **inputs)


def _needs_hopper() -> str | None:
    hopper = torch.cuda.is_available() and multiprocessors(torch.device("cuda", torch.cuda.current_device()))
    return None if hopper else "for GPUs of compute capability 9.0"


def _refused_by_hopper(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **rest: Any) -> str | None:
    return hopper_prefill.refused_by_hopper(q, k_cache, v_cache)


def _unfused(op: Op) -> Peer:
    """Our own kernels for its parts, one after the other."""

    def bind(**inputs: Any) -> Callable[[], Any]:
        return partial(op.compose(KernelSet.default("cuda")), **inputs)

    return Peer("unfused", bind)


def _cublas(*, x, weight, bias=None):
    return partial(F.linear, x, weight, bias)


def _cublas_swiglu(*, x, weight):
    return lambda: swiglu.swiglu(F.linear(x, weight))


def _cublas_add(*, x, weight, residual):
    return partial(torch.addmm, residual, x, weight.t())


def _cublas_add_norm(*, x, weight, residual, norm_weight, eps):
    def call():
        y = torch.addmm(residual, x, weight.t())
        return y, rms_norm.rms_norm(y, norm_weight, eps)

    return call


# The draw of a token.


def _flashinfer_sample(*, logits, temperature, top_k, top_p, min_p, seed, index):
    from flashinfer import sampling as theirs

    stream = {"seed": seed, "offset": index}
    logits = logits.float()  # it takes no other; the copy is not timed
    if top_k is not None:
        top_k = top_k.int()

    def run() -> torch.Tensor:
        probabilities = theirs.softmax(logits, temperature)
        if top_k is not None and top_p is not None:
            return theirs.top_k_top_p_sampling_from_probs(probabilities, top_k, top_p, **stream)
        if top_k is not None:
            return theirs.top_k_sampling_from_probs(probabilities, top_k, **stream)
        if top_p is not None:
            return theirs.top_p_sampling_from_probs(probabilities, top_p, **stream)
        return theirs.sampling_from_probs(probabilities, **stream)

    return run


def _flashinfer_sample_refuses(*, temperature, min_p, **rest):
    if min_p is not None:
        return "has no min-p beside top-k and top-p"
    return None if bool((temperature > 0).all()) else "takes no temperature 0"


def _compiled_reference(op: Op, **options: Any) -> Peer:
    return Peer("torch.compile", lambda **inputs: partial(compiled(op.reference), **inputs), **options)


def _not_worth_compiling(*, logits, top_k, top_p, min_p, **rest):
    """Every set of filters and every size is another program, and takes seconds to compile."""
    both = top_k is not None and top_p is not None and min_p is None
    return None if both and len(logits) in (1, 128) else "measured with top-k and top-p alone, at 1 and 128 rows"


_VLLM, _FLASHINFER, _FLASH_ATTN = _installed("vllm"), _installed("flashinfer"), _installed("flash_attn")

PEERS: dict[str, tuple[Peer, ...]] = {
    "paged_attention": (
        Peer("flash-attn 2", _flash_attn_decode, _FLASH_ATTN, partial(_refuses_cache, pages=256)),
        Peer("FA3 (vLLM)", partial(_fa3_decode, False, 0), _VLLM, _refuses_cache),
        Peer("FA3 (vLLM)", partial(_fa3_decode, True, 0), _VLLM, _refuses_cache),
        Peer("FA3 (vLLM)", partial(_fa3_decode, True, 32), _VLLM, _refuses_cache),
        Peer("FlashInfer", partial(_flashinfer_decode, True), _FLASHINFER, _flashinfer_refuses),
        Peer("FlashInfer", partial(_flashinfer_decode, False), _FLASHINFER, _cuda_cores_refuse),
        Peer("Triton (vLLM)", _vllm_triton_decode, _VLLM, _refuses_cache),
    ),
    "append_attention": (
        _unfused(append_attention.OP),
        Peer("flash-attn 2", _flash_attn_append, _FLASH_ATTN, append_attention.OP.choose("flash_attn").refuses),
    ),
    "prefill_attention": (
        Peer("flash-attn 2", _flash_attn_prefill, _FLASH_ATTN, partial(_refuses_cache, pages=256)),
        Peer("FA3 (vLLM)", _fa3_prefill, _VLLM, _refuses_cache),
        Peer("ours, any GPU", _bound(prefill_attention.prefill_on_any_gpu)),
        Peer("ours, Hopper", _bound(hopper_prefill.hopper_prefill), _needs_hopper, _refused_by_hopper),
    ),
    "linear": (Peer("cuBLAS", _cublas),),
    "norm_linear": (_unfused(norm_linear.OP),),
    "norm_qkv_rotary_store_kv": (_unfused(norm_qkv_rotary_store_kv.OP),),
    "linear_swiglu": (_unfused(linear_swiglu.OP), Peer("cuBLAS, swiglu", _cublas_swiglu)),
    "norm_gate_up_swiglu": (_unfused(norm_gate_up_swiglu.OP),),
    "linear_add": (_unfused(linear_add.OP), Peer("cuBLAS", _cublas_add)),
    "linear_add_norm": (_unfused(linear_add_norm.OP), Peer("cuBLAS, rms_norm", _cublas_add_norm)),
    "rms_norm": (
        Peer("vLLM", _vllm_rms_norm, _VLLM),
        Peer("Liger", _liger_rms_norm, _installed("liger_kernel")),
        _compiled_reference(rms_norm.OP),
    ),
    "add_rms_norm": (
        Peer("vLLM", _vllm_add_rms_norm, _VLLM, in_place=True),
        _compiled_reference(rms_norm.ADD_OP),
    ),
    "swiglu": (Peer("vLLM", _vllm_swiglu, _VLLM), _compiled_reference(swiglu.OP)),
    "rotary": (Peer("vLLM", _vllm_rotary, _VLLM, in_place=True), _compiled_reference(rotary.OP)),
    "rotary_store_kv": (Peer("vLLM, two launches", _vllm_rotary_store_kv, _VLLM, in_place=True),),
    "sample": (
        Peer("FlashInfer", _flashinfer_sample, _FLASHINFER, _flashinfer_sample_refuses),
        _compiled_reference(sampling.OP, refuses=_not_worth_compiling),
    ),
}
"""The peers of each operator."""
