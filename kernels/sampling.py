"""The draw of the next token: temperature, top-k, top-p, min-p, and a random number that is a function of its place.

The draw is the Gumbel-max trick (Maddison et al. 2014, arXiv:1411.0030): argmax(logit + Gumbel noise) is distributed as
softmax(logits). The noise of token t in request's draw i is a hash of (seed, i, t), so a draw depends on nothing else:
not on the row, the batch or the step it falls in.
"""

from __future__ import annotations

import torch

from .op import Op

# SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195), its constants as signed 64-bit integers.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def gumbel_noise(seed: torch.Tensor, index: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise for draw `index` of a request with `seed`: seed, index [rows] int64 → [rows, vocab] float32

    The stream of a draw is SplitMix64's, begun at a hash of seed and index; token t takes its t-th number.
    """
    stream = _mix(_mix(seed) + index * _GOLDEN_GAMMA)
    token = torch.arange(1, vocab_size + 1, device=seed.device)
    bits = _shift_right(_mix(stream.unsqueeze(1) + token * _GOLDEN_GAMMA), 32)
    # -log(-log(1 - u)) with u in (0, 1): the tail that decides a draw is u near 0, where float32 is finest.
    u = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def sample_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    seed: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """A token for each row: the largest logit where temperature is 0, else a draw from the filtered softmax.

    The filters apply in this order, each to what the one before has left: temperature; top_k, the k largest; top_p, the
    fewest largest whose probability reaches p (Holtzman et al. 2019, arXiv:1904.09751); min_p, those at least min_p
    times as likely as the likeliest (arXiv:2407.01082).

    logits [rows, vocab] float32; temperature [rows] float32; top_k [rows] int64 (vocab: off), top_p [rows] float32
    (1: off), min_p [rows] float32 (0: off), each None where no row uses it; seed, index [rows] int64
    → tokens [rows] int64, −1 for a row that holds NaN or whose largest logit is not finite
    """
    largest, greedy = logits.max(dim=-1)
    valid = largest.isfinite()
    drawn = temperature > 0
    scores = (logits - largest.unsqueeze(1)) / torch.where(drawn, temperature, 1).unsqueeze(1)
    if top_k is not None or top_p is not None:
        scores = _keep_top(scores, top_k, top_p)
    if min_p is not None:
        scores = scores.masked_fill(scores < min_p.log().unsqueeze(1), -torch.inf)
    token = (scores + gumbel_noise(seed, index, logits.shape[1])).argmax(dim=-1)
    return torch.where(valid, torch.where(drawn, token, greedy), -1)


def _keep_top(scores: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None) -> torch.Tensor:
    """scores with all but the top-k and then the top-p of each row at −inf."""
    ordered, tokens = scores.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        rank = torch.arange(scores.shape[1], device=scores.device)
        ordered = ordered.masked_fill(rank >= top_k.unsqueeze(1), -torch.inf)
    if top_p is not None:
        probability = ordered.softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability
        # The likeliest token stays whatever p is, and at 1 all do, though a sum may round to 1 before they end.
        dropped = (before >= top_p.unsqueeze(1)) & (top_p.unsqueeze(1) < 1)
        dropped[:, 0] = False
        ordered = ordered.masked_fill(dropped, -torch.inf)
    return torch.empty_like(scores).scatter_(1, tokens, ordered)


OP = Op("sample", reference=sample_reference)
