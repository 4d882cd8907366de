"""From logits to tokens: penalties, the draw, and log-probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch

from ..kernels.kernel_set import KernelSet
from .sampling_params import SamplingParams


class SamplingRow(Protocol):
    """What the sampler knows of a request; `engine.sequence.Sequence` is one."""

    params: SamplingParams
    seed: int
    token_ids: list[int]
    num_prompt: int
    stop_token_ids: frozenset[int]


class Logprobs(NamedTuple):
    """The model's natural log-probabilities at one place of a text.

    token_id, logprob: of the token that stands there.   top: (token id, log-probability) of the likeliest, in order
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Sampler:
    """Chooses a token for each row of a batch, each row by its own SamplingParams."""

    def __init__(self, kernels: KernelSet):
        self.kernels = kernels

    def __call__(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[list[int], list[Logprobs | None]]:
        """logits [rows, vocab] float32, left unchanged → a token a row, −1 where its logits are not numbers, and
        log-probabilities where the row asked for them"""
        adjusted = _adjust(logits, rows)
        tokens = self._draw(adjusted, rows).tolist()
        reported: list[Logprobs | None] = [None] * len(rows)
        wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None and tokens[i] >= 0]
        if wanted:
            count = max(rows[i].params.logprobs for i in wanted)
            of_wanted = token_logprobs(logits[wanted], [tokens[i] for i in wanted], count)
            for i, entry in zip(wanted, of_wanted, strict=True):
                reported[i] = entry._replace(top=entry.top[: rows[i].params.logprobs])
        return tokens, reported

    def _draw(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
        params = [row.params for row in rows]
        if all(p.temperature == 0 for p in params):
            largest, tokens = logits.max(dim=-1)
            return torch.where(largest.isfinite(), tokens, -1)
        device, vocab_size = logits.device, logits.shape[1]

        def column(values: Iterable, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(list(values), dtype=dtype, device=device)

        filters = {
            "top_k": (any(p.top_k for p in params), (p.top_k or vocab_size for p in params), torch.int64),
            "top_p": (any(p.top_p < 1 for p in params), (p.top_p for p in params), torch.float32),
            "min_p": (any(p.min_p for p in params), (p.min_p for p in params), torch.float32),
        }
        return self.kernels.sample(
            logits,
            column((p.temperature for p in params), torch.float32),
            **{name: column(values, dtype) if used else None for name, (used, values, dtype) in filters.items()},
            seed=column((row.seed for row in rows), torch.int64),
            index=column((len(row.token_ids) - row.num_prompt for row in rows), torch.int64),
        )


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], count: int) -> list[Logprobs]:
    """The log-probability of one token in each row, and the `count` likeliest.   logits [rows, vocab] float32"""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    values, ids = logprobs.topk(min(count, logits.shape[1]), dim=-1)
    top = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [Logprobs(*entry) for entry in zip(tokens, chosen, top, strict=True)]


class _Edits:
    """(row, token, value) triples, each place at most once, to be applied to logits in one go."""

    def __init__(self):
        self.rows: list[int] = []
        self.tokens: list[int] = []
        self.values: list[float] = []

    def add(self, row: int, tokens: Iterable[int], values: Iterable[float]) -> None:
        before = len(self.tokens)
        self.tokens.extend(tokens)
        self.values.extend(values)
        self.rows.extend([row] * (len(self.tokens) - before))

    def tensors(self, device: torch.device) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """((rows, tokens), values): an index into logits, and what belongs there."""
        index = torch.tensor([self.rows, self.tokens], dtype=torch.int64, device=device)
        return (index[0], index[1]), torch.tensor(self.values, dtype=torch.float32, device=device)


def _adjust(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """The logits with penalties, biases and forbidden ends applied, a copy where a row has any."""
    repeated, subtracted, added, forbidden = _Edits(), _Edits(), _Edits(), _Edits()
    for i, row in enumerate(rows):
        p = row.params
        if p.repetition_penalty != 1:
            seen = set(row.token_ids)
            repeated.add(i, seen, [p.repetition_penalty] * len(seen))
        if p.presence_penalty or p.frequency_penalty:
            counts = Counter(row.token_ids[row.num_prompt :])
            subtracted.add(i, counts, [p.presence_penalty + p.frequency_penalty * n for n in counts.values()])
        if p.logit_bias:
            added.add(i, p.logit_bias, p.logit_bias.values())
        if len(row.token_ids) - row.num_prompt < p.min_tokens:
            forbidden.add(i, row.stop_token_ids, [float("-inf")] * len(row.stop_token_ids))
    if not any(edits.tokens for edits in (repeated, subtracted, added, forbidden)):
        return logits

    logits = logits.clone()
    place, penalty = repeated.tensors(logits.device)
    logits[place] = torch.where(logits[place] > 0, logits[place] / penalty, logits[place] * penalty)
    place, amount = subtracted.tensors(logits.device)
    logits[place] -= amount
    place, amount = added.tensors(logits.device)
    logits[place] += amount
    place, amount = forbidden.tensors(logits.device)
    logits[place] = amount
    return logits
