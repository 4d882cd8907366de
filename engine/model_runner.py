"""From a batch to tokens: the tensors of a step, the forward passes, the draw."""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass
from itertools import chain

import torch

from ..model.attention_metadata import AttentionMetadata
from ..model.qwen2 import LayerCache, Qwen2
from ..model.sampler import Logprobs, Sampler, token_logprobs
from .scheduler import Batch, Chunk
from .sequence import Sequence

PROMPT_LOGPROB_ROWS = 64
"""Prompt tokens whose logits exist at once: at a vocabulary of 152064, 39 MB in float32."""


@dataclass(frozen=True)
class StepResult:
    """tokens, logprobs: one for each of `batch.sampled`; a token is −1 where the logits were not numbers
    prompt_logprobs:  by sequence id, what this step adds to a prompt's log-probabilities
    """

    tokens: list[int]
    logprobs: list[Logprobs | None]
    prompt_logprobs: dict[int, list[Logprobs]]


class ModelRunner:
    """Runs a model over a paged cache, on the model's device.

    cache: of each layer, see `allocate_cache`
    """

    def __init__(self, model: Qwen2, sampler: Sampler, cache: list[LayerCache]):
        self.model, self.sampler, self.cache = model, sampler, cache
        self.device = model.embedding.device
        self.block_size = cache[0][0].shape[1]

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        """Prefills the batch's chunks, decodes its sequences, and draws a token for those that are due."""
        hidden, prompt_logprobs = [], {}
        if batch.chunks:
            x = self._forward([c.seq for c in batch.chunks], [(c.start, c.end) for c in batch.chunks], decode=False)
            ends = torch.tensor([c.length for c in batch.chunks]).cumsum(0)
            last = [i for i, c in enumerate(batch.chunks) if c.end == len(c.seq.token_ids)]
            hidden.append(x[(ends[last] - 1).to(self.device)])
            for chunk, end in zip(batch.chunks, ends.tolist(), strict=True):
                if chunk.seq.params.prompt_logprobs is not None:
                    prompt_logprobs[chunk.seq.id] = self._prompt_logprobs(chunk, x[end - chunk.length : end])
        if batch.decodes:
            lengths = [len(seq.token_ids) for seq in batch.decodes]
            hidden.append(self._forward(batch.decodes, [(n - 1, n) for n in lengths], decode=True))
        if not batch.sampled:
            return StepResult([], [], prompt_logprobs)
        logits = self.model.logits(torch.cat(hidden))
        return StepResult(*self.sampler(logits, batch.sampled), prompt_logprobs)

    def _forward(self, seqs: Row[Sequence], spans: Row[tuple[int, int]], *, decode: bool) -> torch.Tensor:
        """The hidden states of each sequence's tokens start … end − 1, one sequence behind the other."""
        token_ids = list(chain.from_iterable(s.token_ids[a:b] for s, (a, b) in zip(seqs, spans, strict=True)))
        starts, ends = torch.tensor(spans).unbind(1)
        lengths = ends - starts
        query_start = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        row = torch.repeat_interleave(torch.arange(len(seqs)), lengths)
        positions = torch.arange(len(token_ids)) - (query_start[:-1] - starts)[row]

        width = max(len(s.block_table) for s in seqs)
        block_table = torch.tensor([s.block_table + [-1] * (width - len(s.block_table)) for s in seqs])
        slots = block_table[row, positions // self.block_size] * self.block_size + positions % self.block_size

        where = AttentionMetadata(
            positions=positions.to(self.device),
            slot_mapping=slots.to(self.device),
            block_table=block_table.to(self.device, torch.int32),
            context_lens=ends.to(self.device, torch.int32),
            query_start=None if decode else query_start.to(self.device, torch.int32),
            max_query_len=int(lengths.max()),
            max_context_len=int(ends.max()),
        )
        return self.model(torch.tensor(token_ids, device=self.device), self.cache, where)

    def _prompt_logprobs(self, chunk: Chunk, hidden: torch.Tensor) -> list[Logprobs]:
        """The chunk's part of the prompt's log-probabilities, from the first one missing on.

        seq.prompt_logprobs begins with the prompt's second token: nothing predicts the first.
        """
        seq = chunk.seq
        first = max(chunk.start, len(seq.prompt_logprobs)) + 1
        entries: list[Logprobs] = []
        for start in range(first, min(chunk.end + 1, seq.num_prompt), PROMPT_LOGPROB_ROWS):
            end = min(start + PROMPT_LOGPROB_ROWS, chunk.end + 1, seq.num_prompt)
            logits = self.model.logits(hidden[start - 1 - chunk.start : end - 1 - chunk.start])
            entries += token_logprobs(logits, seq.token_ids[start:end], seq.params.prompt_logprobs)
        return entries
