"""From a batch to tokens: the tensors of a step, the forward passes, the draw."""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass
from itertools import chain

import torch

from ..model.attention_metadata import AttentionMetadata
from ..model.logprobs import Logprobs, TokenLogprobs
from ..model.qwen2 import LayerCache, Qwen2
from ..model.sampler import Draw, Sampler
from .scheduler import Batch, Chunk
from .sequence import Sequence

PROMPT_LOGPROB_ROWS = 64
"""Prompt tokens whose logits exist at once: at a vocabulary of 152064, 39 MB in float32."""


@dataclass(frozen=True)
class StepResult:
    """tokens, logprobs: one for each of `batch.sampled`; a token is −1 where the logits were not numbers
    prompt_logprobs:  by sequence id, those of the prompt's tokens that this step computed
    """

    tokens: list[int]
    logprobs: list[Logprobs | None]
    prompt_logprobs: dict[int, list[Logprobs]]


class Step:
    """A batch that the device is computing."""

    def __init__(self, batch: Batch, draw: Draw | None, prompt_logprobs: dict[int, list[TokenLogprobs]]):
        self.batch = batch
        self._draw, self._prompt_logprobs = draw, prompt_logprobs

    def result(self) -> StepResult:
        """Waits for the device."""
        tokens, logprobs = self._draw.result() if self._draw is not None else ([], [])
        of_prompts = {
            seq_id: [entry for piece in pieces for entry in piece.result()]
            for seq_id, pieces in self._prompt_logprobs.items()
        }
        return StepResult(tokens, logprobs, of_prompts)

    def tokens_of(self, seqs: Row[Sequence]) -> torch.Tensor:
        """[len(seqs)] int64, on the device: what each drew in this step, −1 for those that drew nothing."""
        place = {seq.id: i for i, seq in enumerate(self.batch.sampled)}
        rows = torch.tensor([place.get(seq.id, -1) for seq in seqs], device=self._draw.tokens.device)
        return torch.where(rows < 0, -1, self._draw.tokens[rows])


class ModelRunner:
    """Runs a model over a paged cache, on the model's device.

    cache: of each layer, see `allocate_cache`
    """

    def __init__(self, model: Qwen2, sampler: Sampler, cache: list[LayerCache]):
        self.model, self.sampler, self.cache = model, sampler, cache
        self.device = model.embedding.device
        self.block_size = cache[0][0].shape[1]

    @torch.inference_mode()
    def launch(self, batch: Batch, previous: Step | None = None) -> Step:
        """Prefills the batch's chunks, decodes its sequences, and draws a token for those that are due.

        previous: the step before, where its tokens may not be known to the host yet
        """
        hidden, prompt_logprobs = [], {}
        if batch.chunks:
            seqs, spans = [c.seq for c in batch.chunks], [(c.start, c.end) for c in batch.chunks]
            ids = chain.from_iterable(seq.token_ids[start:end] for seq, (start, end) in zip(seqs, spans, strict=True))
            x = self._forward(torch.tensor(list(ids), device=self.device), seqs, spans, decode=False)
            ends = torch.tensor([c.length for c in batch.chunks]).cumsum(0)
            last = [i for i, c in enumerate(batch.chunks) if c.end == c.seq.num_tokens]
            hidden.append(x[(ends[last] - 1).to(self.device)])
            for chunk, end in zip(batch.chunks, ends.tolist(), strict=True):
                if chunk.seq.params.prompt_logprobs is not None:
                    prompt_logprobs[chunk.seq.id] = self._prompt_logprobs(chunk, x[end - chunk.length : end])
        newest = None
        if batch.decodes:
            known = [seq.num_pending == 0 for seq in batch.decodes]
            ids = torch.tensor([s.token_ids[-1] for s in batch.decodes], device=self.device)
            if not all(known):
                newest = previous.tokens_of(batch.sampled)
                # A row without a token has ended, and whatever it computes now is not used.
                pending = newest[len(batch.sampled) - len(batch.decodes) :].clamp(min=0)
                ids = torch.where(torch.tensor(known, device=self.device), ids, pending)
            spans = [(seq.num_tokens - 1, seq.num_tokens) for seq in batch.decodes]
            hidden.append(self._forward(ids, batch.decodes, spans, decode=True))
        draw = None
        if batch.sampled:
            draw = self.sampler(self.model.logits(torch.cat(hidden)), batch.sampled, newest)
        return Step(batch, draw, prompt_logprobs)

    def _forward(
        self, token_ids: torch.Tensor, seqs: Row[Sequence], spans: Row[tuple[int, int]], *, decode: bool
    ) -> torch.Tensor:
        """The hidden states of each sequence's tokens start … end − 1, one sequence behind the other."""
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
        return self.model(token_ids, self.cache, where)

    def _prompt_logprobs(self, chunk: Chunk, hidden: torch.Tensor) -> list[TokenLogprobs]:
        """The log-probabilities of the prompt's tokens that the chunk's tokens predict, in pieces.

        Nothing predicts a prompt's first token, and a prompt's last token predicts none of it.
        """
        seq, pieces = chunk.seq, []
        for start in range(chunk.start + 1, min(chunk.end + 1, seq.num_prompt), PROMPT_LOGPROB_ROWS):
            end = min(start + PROMPT_LOGPROB_ROWS, chunk.end + 1, seq.num_prompt)
            logits = self.model.logits(hidden[start - 1 - chunk.start : end - 1 - chunk.start])
            tokens = torch.tensor(seq.token_ids[start:end], device=self.device)
            pieces.append(TokenLogprobs(logits, tokens, seq.params.prompt_logprobs))
        return pieces
