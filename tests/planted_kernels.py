"""Right kernels, and wrong ones with one mistake each, which `check` must name."""

from __future__ import annotations

import torch
from microvllm.kernels import paged_attention, rms_norm
from microvllm.kernels.op import Case
from microvllm.kernels.paged_attention import paged_attention_reference
from microvllm.kernels.rms_norm import rms_norm_reference

NORM, ATTENTION = rms_norm.OP, paged_attention.OP
ROWS = Case(tokens=7, hidden=100)
TEXTS = Case(batch=3, context=50, shortest=5, heads=4, kv_heads=2, head_dim=64, block_size=16, padded=1)
HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64


def judge(op, kernel, *cases, dtypes=(HALF,), **options):
    return op.check(kernel, cases, dtypes=dtypes, device="cpu", **options)


def norm(x, weight, eps):
    """A right kernel: the reference's formula with one rounding, at the end."""
    return rms_norm_reference(x.float(), weight.float(), eps).to(x.dtype)


def attention(q, k_cache, v_cache, block_table, context_lens, scale, k_scale=None, v_scale=None):
    """A right kernel: the reference's formula with one rounding, at the end."""
    wide = (x.float() for x in (q, k_cache, v_cache))
    return paged_attention_reference(*wide, block_table, context_lens, scale).to(q.dtype)


# Wrong ones.


def one_token_less(q, k_cache, v_cache, block_table, context_lens, scale, *scales):
    return attention(q, k_cache, v_cache, block_table, (context_lens - 1).clamp(min=0), scale)


def one_token_more(q, k_cache, v_cache, block_table, context_lens, scale, *scales):
    return attention(q, k_cache, v_cache, block_table, context_lens + (context_lens > 0), scale)


def forgotten_scale(q, k_cache, v_cache, block_table, context_lens, scale, *scales):
    return attention(q, k_cache, v_cache, block_table, context_lens, 1.0)


def swapped_k_heads(q, k_cache, v_cache, *rest):
    return attention(q, k_cache.flip(2), v_cache, *rest)


def swapped_v_heads(q, k_cache, v_cache, *rest):
    return attention(q, k_cache, v_cache.flip(2), *rest)


def swapped_k_and_v(q, k_cache, v_cache, *rest):
    return attention(q, v_cache, k_cache, *rest)


def heads_in_the_wrong_groups(q, *rest):
    return attention(q.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2), *rest)


def padded_row_not_zero(q, k_cache, v_cache, block_table, context_lens, scale, *scales):
    y = attention(q, k_cache, v_cache, block_table, context_lens, scale)
    return y + (context_lens == 0).view(-1, 1, 1)


def unwritten_tail(x, weight, eps):
    y, whole = torch.empty_like(x), x.shape[1] // 8 * 8
    y[:, :whole] = norm(x, weight, eps)[:, :whole]
    return y


def unwritten_padded_row(q, k_cache, v_cache, block_table, context_lens, scale, *scales):
    y = q.new_empty(q.shape)
    texts = context_lens > 0
    y[texts] = attention(q[texts], k_cache, v_cache, block_table[texts], context_lens[texts], scale)
    return y


def read_before_written(x, weight, eps):
    return norm(x, weight, eps) + 0 * torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)


def out_of_bounds(x, weight, eps):
    y = torch.empty(x.shape, dtype=x.dtype)
    y.as_strided((x.numel() + 3,), (1,)).fill_(0)
    return y.copy_(norm(x, weight, eps))


def out_of_bounds_in_front(x, weight, eps):
    y = torch.empty(x.shape, dtype=x.dtype)
    y.as_strided((1,), (1,), y.storage_offset() - 1).fill_(0)
    return y.copy_(norm(x, weight, eps))


def changed_input(x, weight, eps):
    y = norm(x, weight, eps)
    x[-1, -1] += 1
    return y


def normed_in_place(x, weight, eps):
    return x.copy_(norm(x, weight, eps))


def nan_in_one_place(x, weight, eps):
    y = norm(x, weight, eps)
    y[3, 14] = torch.nan
    return y


def infinity_in_one_place(x, weight, eps):
    y = norm(x, weight, eps)
    y[3, 14] = -torch.inf
    return y


def last_bit_by_chance(x, weight, eps):
    y = norm(x, weight, eps)
    return torch.where(torch.rand(y.shape) < 0.01, y.nextafter(y.new_tensor(0)), y)


def wide_output(x, weight, eps):
    return norm(x, weight, eps).double()


def flat_output(x, weight, eps):
    return norm(x, weight, eps).flatten()


def no_output(x, weight, eps):
    norm(x, weight, eps)


def two_outputs(x, weight, eps):
    return norm(x, weight, eps), x


def error_raised(x, weight, eps):
    raise RuntimeError("no such launch")
