"""From logits to tokens: the draw, what some requests ask for beside it, and log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..kernels.kernel_set import KernelSet
from .logprobs import Logprobs, TokenLogprobs
from .penalties import adjust, adjusts
from .sampling_columns import SamplingColumns
from .sampling_row import SamplingRow
from .transfer import HostCopy, to_device


class Draw:
    """Tokens that the device is drawing: `tokens` [rows] int64, −1 where a row's logits are not numbers.

    redrawn: whether some were drawn twice, the second time from other logits than the model's
    """

    def __init__(self, tokens: torch.Tensor, logits: torch.Tensor, rows: Sequence[SamplingRow], *, redrawn: bool):
        self.tokens, self.redrawn = tokens, redrawn
        self._copy = HostCopy(tokens)
        self._counts = {i: row.params.logprobs for i, row in enumerate(rows) if row.params.logprobs is not None}
        if self._counts:
            wanted = to_device(list(self._counts), torch.int64, tokens.device)
            self._logprobs = TokenLogprobs(logits[wanted], tokens[wanted], max(self._counts.values()))

    def known(self) -> list[int]:
        """The tokens, known to the host; waits for the device."""
        return self._copy.wait()[0].tolist()

    def result(self) -> tuple[list[int], list[Logprobs | None]]:
        """The tokens, and log-probabilities where a row asked for them and has a token; waits for the device."""
        tokens = self.known()
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

    def __call__(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Draw:
        """logits [rows, vocab], left unchanged; every row's `token_ids` hold all its tokens"""
        columns = SamplingColumns.of(rows, logits.shape[1], logits.device)
        return self.settle(logits, self.draw(logits, columns), rows)

    def draw(self, logits: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
        """Tokens [rows] int64 from the logits as they are; −1 where they are not numbers. A CUDA graph can hold it."""
        if columns.greedy:
            largest, tokens = logits.max(dim=-1)
            return torch.where(largest.isfinite(), tokens, -1)
        c = columns
        return self.kernels.sample(logits, c.temperature, c.top_k, c.top_p, c.min_p, c.seed, c.index)

    def settle(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        rows: Sequence[SamplingRow],
        newest: Callable[[], torch.Tensor] | None = None,
    ) -> Draw:
        """Draws again, in place, where a row asks for other logits than the model's, and reports what rows ask for.

        logits [rows, vocab], left unchanged; tokens [rows] int64, from `draw`
        newest: gives the last tokens [rows] int64, on the device, that rows' `token_ids` lack
        """
        again = [i for i, row in enumerate(rows) if adjusts(row)]
        if again:
            index = to_device(again, torch.int64, logits.device)
            chosen = [rows[i] for i in again]
            behind = any(len(row.token_ids) < row.num_tokens for row in chosen)
            adjusted = adjust(logits[index].float(), chosen, newest()[index] if behind else None)
            tokens[index] = self.draw(adjusted, SamplingColumns.of(chosen, logits.shape[1], logits.device))
        return Draw(tokens, logits, rows, redrawn=bool(again))
