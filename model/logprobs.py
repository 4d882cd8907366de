"""Log-probabilities of tokens, as a client is told them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .transfer import HostCopy


class Logprobs(NamedTuple):
    """The model's natural log-probabilities at one place of a text.

    token_id, logprob: of the token that stands there.   top: (token id, log-probability) of the likeliest, in order
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class TokenLogprobs:
    """The log-probability of one token in each row, and of the `count` likeliest.

    logits [rows, vocab]; tokens [rows] int64, −1 for a row that has none and whose entry means nothing
    """

    def __init__(self, logits: torch.Tensor, tokens: torch.Tensor, count: int):
        logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
        chosen = logprobs.gather(1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1)
        self._copy = HostCopy(tokens, chosen, *logprobs.topk(min(count, logits.shape[1]), dim=-1))

    def result(self) -> list[Logprobs]:
        """An entry for each row; waits for the device."""
        tokens, chosen, values, ids = (tensor.tolist() for tensor in self._copy.wait())
        top = [list(zip(i, v, strict=True)) for i, v in zip(ids, values, strict=True)]
        return [Logprobs(*entry) for entry in zip(tokens, chosen, top, strict=True)]
