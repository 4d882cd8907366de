"""What a request asks to be done to its logits before a token is drawn: penalties, biases, forbidden tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .grammar import Grammar, masks
from .sampling_row import SamplingRow
from .transfer import to_device


class _Places:
    """Places (row, token) in logits, each at most once, and a value for each."""

    def __init__(self):
        self._rows: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def add(self, row: int, tokens: np.ndarray, values: np.ndarray | float) -> None:
        """values: of each token, or of them all"""
        self._rows.append(np.full(len(tokens), row, np.int64))
        self._tokens.append(tokens)
        self._values.append(np.broadcast_to(values, len(tokens)))

    def tensors(self, device: torch.device) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """((rows, tokens), values): an index into logits, and what belongs there."""
        none = np.empty(0, np.int64)
        rows, tokens, values = (np.concatenate([none, *parts]) for parts in (self._rows, self._tokens, self._values))
        index = to_device(np.stack([rows, tokens]), torch.int64, device)
        return (index[0], index[1]), to_device(values, torch.float32, device)


def adjusts(row: SamplingRow) -> bool:
    """Whether a row's next token is drawn from other logits than the model's."""
    p = row.params
    return (
        _remembers(row)
        or bool(p.logit_bias)
        or row.grammar is not None
        or (_may_not_end(row) and bool(row.stop_token_ids))
    )


def adjust(logits: torch.Tensor, rows: Sequence[SamplingRow], newest: torch.Tensor | None) -> torch.Tensor:
    """The logits with penalties, biases, forbidden ends and grammars applied, a copy.

    logits [rows, vocab] float32; newest [rows] int64, on the device, the last token of each row whose `token_ids` lack
    it, None where none do
    """
    constrained = [i for i, row in enumerate(rows) if row.grammar is not None]
    if constrained:  # first: it says which texts are complete
        allowed = _allowed([rows[i].grammar for i in constrained], logits)
    repeated, counted, added, forbidden = (_Places() for _ in range(4))
    for i, row in enumerate(rows):
        p = row.params
        if _remembers(row):
            tokens, times = map(np.array, row.occurrences.of(row.token_ids, row.num_prompt))
            if p.repetition_penalty != 1:
                repeated.add(i, tokens, p.repetition_penalty)
            if p.presence_penalty or p.frequency_penalty:
                counted.add(i, tokens[times > 0], times[times > 0])
        if p.logit_bias:
            added.add(i, np.array([*p.logit_bias]), np.array([*p.logit_bias.values()]))
        if _may_not_end(row):
            forbidden.add(i, np.array([*row.stop_token_ids], np.int64), -np.inf)

    original, logits = logits, logits.clone()
    place, penalty = repeated.tensors(logits.device)
    logits[place] = _repeated(logits[place], penalty)
    (row, known), times = counted.tensors(logits.device)
    logits[row, known] -= _for_times(times, rows, row)
    place, amount = added.tensors(logits.device)
    logits[place] += amount
    place, amount = forbidden.tensors(logits.device)
    logits[place] = amount
    behind = [i for i, row in enumerate(rows) if len(row.token_ids) < row.num_tokens and _remembers(row)]
    if behind:
        assert newest is not None
        index = to_device(behind, torch.int64, logits.device)
        token = newest[index].clamp(min=0)  # a row without a token has ended
        times = torch.zeros(len(rows), device=logits.device).index_add_(0, row, times * (known == newest[row]))
        logits[index, token] = _of_newest(original[index, token], token, times[index] + 1, [rows[i] for i in behind])
    if constrained:
        index = to_device(constrained, torch.int64, logits.device)
        logits[index] = logits[index].masked_fill(~allowed, -torch.inf)
    return logits


def _allowed(grammars: Sequence[Grammar], logits: torch.Tensor) -> torch.Tensor:
    """[grammars, vocab] bool, on the device: the tokens that may come next."""
    packed = to_device(masks(grammars), torch.uint8, logits.device)
    bit = torch.arange(8, dtype=torch.uint8, device=logits.device)
    return (packed.unsqueeze(2) >> bit & 1).flatten(1)[:, : logits.shape[1]].bool()


def _may_not_end(row: SamplingRow) -> bool:
    if row.grammar is not None and row.grammar.is_complete:
        return False
    return row.num_tokens - row.num_prompt < row.params.min_tokens


def _remembers(row: SamplingRow) -> bool:
    p = row.params
    return bool(p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty)


def _repeated(logit: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    return torch.where(logit > 0, logit / penalty, logit * penalty)


def _for_times(
    times: torch.Tensor, rows: Sequence[SamplingRow], row: torch.Tensor | slice = slice(None)
) -> torch.Tensor:
    """What is taken from logits whose tokens stand so many times in an output.   row: that of each, or all in order"""
    presence, frequency = (
        to_device([getattr(row.params, name) for row in rows], torch.float64, times.device)
        for name in ("presence_penalty", "frequency_penalty")
    )
    return (presence[row] + frequency[row] * times).float()


def _of_newest(
    logit: torch.Tensor, token: torch.Tensor, times: torch.Tensor, rows: Sequence[SamplingRow]
) -> torch.Tensor:
    """The logit of each row's newest token, which only the device knows, after all that `adjust` does to it: step by
    step the same arithmetic, so that it makes no difference who knows a token.

    logit [rows] float32, token [rows] int64; times [rows], how often it stands in the output, this time too
    """
    params = [row.params for row in rows]

    def column(values: list, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return to_device(values, dtype, logit.device)

    def padded(lists: list[list], fill: float, dtype: torch.dtype) -> torch.Tensor:
        longest = max(map(len, lists))
        return column([entries + [fill] * (longest - len(entries)) for entries in lists], dtype)

    def among(lists: list[list[int]]) -> torch.Tensor:
        """[rows, longest]: where the token stands in each list"""
        return padded(lists, -1, torch.int64) == token.unsqueeze(1)

    logit = _repeated(logit, column([p.repetition_penalty for p in params]))
    logit = logit - _for_times(times, rows)
    biases = [p.logit_bias for p in params]
    bias = padded([list(b.values()) for b in biases], 0.0, torch.float32)
    logit = logit + (among([list(b) for b in biases]) * bias).sum(1)
    early = column([_may_not_end(row) for row in rows], torch.bool)
    ends = among([sorted(row.stop_token_ids) for row in rows]).any(1)
    return logit.masked_fill(early & ends, -torch.inf)
