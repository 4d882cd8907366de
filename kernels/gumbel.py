"""The noise of a draw: Gumbel variates that are a hash of (seed, index, token), in PyTorch and in Triton.

The hash is SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195): the stream of a draw begins at a hash
of seed and index, and token t takes its t-th number u. The noise is −log(E) with E = −log(1 − u), which is exponential.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
# As the signed numbers that PyTorch multiplies; the products have the same bits.
_SIGNED_GAMMA, _SIGNED_MIX_1, _SIGNED_MIX_2 = (x.value - (1 << 64) for x in (GAMMA, _MIX_1, _MIX_2))


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _SIGNED_MIX_1
    x = (x ^ _shift_right(x, 27)) * _SIGNED_MIX_2
    return x ^ _shift_right(x, 31)


def gumbel_noise(seed: torch.Tensor, index: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise for draw `index` of a request with `seed`.

    seed, index [rows] int64 → [rows, vocab_size] float32
    """
    stream = _mix(_mix(seed) + index * _SIGNED_GAMMA)
    token = torch.arange(1, vocab_size + 1, device=seed.device)
    bits = _shift_right(_mix(stream.unsqueeze(1) + token * _SIGNED_GAMMA), 32)
    # -log(-log(1 - u)) with u in (0, 1): the tail that decides a draw is u near 0, where float32 is finest.
    u = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


@triton.jit
def _scramble(x):
    x = (x ^ (x >> 30)) * _MIX_1
    return (x ^ (x >> 27)) * _MIX_2


@triton.jit
def _hash(x):
    x = _scramble(x)
    return x ^ (x >> 31)


@triton.jit
def stream_of(seed_ptr, index_ptr, row):
    """The state that the stream of a row's draw begins at; token t's is t + 1 times GAMMA later."""
    seed = tl.load(seed_ptr + row).to(tl.uint64)
    index = tl.load(index_ptr + row).to(tl.uint64)
    return _hash(_hash(seed) + index * GAMMA)


@triton.jit
def exponential(stream, token):
    """A token's exponential variate −log1p(−u), to 2 units in the last place."""
    return exponential_at(stream + (token + 1).to(tl.uint64) * GAMMA)


@triton.jit
def uniform_at(state):
    """A token's u by its state; 1 for the greatest, which the exponential variate takes as 1 − 2^−24."""
    # The upper half of _hash: a shift and an exclusive or of 32 bits, and a conversion that 64 bits would make slow.
    upper = (_scramble(state) >> 32).to(tl.uint32)
    bits = upper ^ (upper >> 31)
    return bits.to(tl.float32) * 2.0**-32 + 2.0**-33


@triton.jit
def exponential_at(state):
    """`exponential` by the token's state.

    With 1 − u = m · 2^e and m in [2/3, 4/3) it is −(e · log 2 + log1p(f)), where f = m − 1 = 2^−e · (1 − u) − 1 is
    written so that it is exact. log1p(f) is f + f² · q(f), and q the polynomial that errs least relative to it.
    """
    u = tl.minimum(uniform_at(state), 1 - 2.0**-24)
    exponent = ((1 - u).to(tl.int32, bitcast=True) - 0x3F2AAAAB) & -0x800000  # e · 2²³; 0x3F2AAAAB is 2/3
    scale = (0x3F800000 - exponent).to(tl.float32, bitcast=True)  # 2^−e; 0x3F800000 is 1
    f = (scale - 1) - scale * u
    q = 0.140263677 * f - 0.153885499
    q = q * f + 0.139958054
    q = q * f - 0.164159596
    q = q * f + 0.200111687
    q = q * f - 0.250078201
    q = q * f + 0.333331972
    q = q * f - 0.499999374
    log1p = f * f * q + f
    return -(exponent.to(tl.float32) * (0.6931471805599453 * 2.0**-23) + log1p)
