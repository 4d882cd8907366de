"""From logits to tokens: what a request asks for, the draw, and log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..kernels.kernel_set import KernelSet
from .host_copy import HostCopy
from .logprobs import Logprobs, TokenLogprobs
from .penalties import adjust
from .sampling_row import SamplingRow


class Draw:
    """Tokens that the device is drawing: `tokens` [rows] int64, −1 where a row's logits are not numbers."""

    def __init__(self, tokens: torch.Tensor, logits: torch.Tensor, rows: Sequence[SamplingRow]):
        self.tokens = tokens
        self._copy = HostCopy(tokens)
        self._counts = {i: row.params.logprobs for i, row in enumerate(rows) if row.params.logprobs is not None}
        if self._counts:
            wanted = list(self._counts)
            self._logprobs = TokenLogprobs(logits[wanted], tokens[wanted], max(self._counts.values()))

    def result(self) -> tuple[list[int], list[Logprobs | None]]:
        """The tokens, and log-probabilities where a row asked for them and has a token; waits for the device."""
        tokens = self._copy.wait()[0].tolist()
        reported: list[Logprobs | None] = [None] * len(tokens)
        if self._counts:
            for (i, count), entry in zip(self._counts.items(), self._logprobs.result(), strict=True):
                if tokens[i] >= 0:
                    reported[i] = entry._replace(top=entry.top[:count])
        return tokens, reported


class Sampler:
    """Chooses a token for each row of a batch, each row by its own SamplingParams."""

    def __init__(self, kernels: KernelSet):
        self.kernels = kernels

    def __call__(self, logits: torch.Tensor, rows: Sequence[SamplingRow], newest: torch.Tensor | None = None) -> Draw:
        """logits [rows, vocab] float32, left unchanged

        newest [rows] int64, on the device: the last token of each row whose `token_ids` lack it; None where none do
        """
        return Draw(self._draw(adjust(logits, rows, newest), rows), logits, rows)

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
            index=column((row.num_tokens - row.num_prompt for row in rows), torch.int64),
        )
