"""From a batch to tokens: the tensors of a step, the forward passes, the draw."""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass
from itertools import accumulate, chain

import torch

from ..model.logprobs import Logprobs, TokenLogprobs
from ..model.qwen2 import LayerCache, Qwen2
from ..model.sampler import Draw, Sampler
from ..model.sampling_columns import SamplingColumns
from ..model.transfer import to_device
from .chunk_rows import chunk_tensors
from .decode_rows import DecodeRows
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
    """A batch that the device is computing.

    draws: of the sequences whose prefill ends here, and of those that decode; in the order of `batch.sampled`
    """

    def __init__(self, batch: Batch, draws: list[Draw], prompt_logprobs: dict[int, list[TokenLogprobs]]):
        self.batch = batch
        self._draws, self._prompt_logprobs = draws, prompt_logprobs

    def result(self) -> StepResult:
        """Waits for the device."""
        drawn = [draw.result() for draw in self._draws]
        tokens, logprobs = (
            (list(chain.from_iterable(parts)) for parts in zip(*drawn, strict=True)) if drawn else ([], [])
        )
        of_prompts = {
            seq_id: [entry for piece in pieces for entry in piece.result()]
            for seq_id, pieces in self._prompt_logprobs.items()
        }
        return StepResult(tokens, logprobs, of_prompts)

    def drawn(self) -> dict[int, int]:
        """By sequence id, what each drew; waits for the device."""
        tokens = chain.from_iterable(draw.known() for draw in self._draws)
        return {seq.id: token for seq, token in zip(self.batch.sampled, tokens, strict=True)}

    def tokens_of(self, seqs: Row[Sequence]) -> torch.Tensor:
        """[len(seqs)] int64, on the device: what each drew in this step, −1 for those that drew nothing."""
        tokens = torch.cat([draw.tokens for draw in self._draws])
        place = {seq.id: i for i, seq in enumerate(self.batch.sampled)}
        rows = to_device([place.get(seq.id, -1) for seq in seqs], torch.int64, tokens.device)
        return torch.where(rows < 0, -1, tokens[rows])


class ModelRunner:
    """Runs a model over a paged cache, on the model's device.

    cache:           of each layer, see `allocate_cache`
    max_batch_size:  sequences of a decode
    """

    capture_seconds = 0.0
    """What capturing CUDA graphs took, with all that was compiled for them."""

    def __init__(self, model: Qwen2, sampler: Sampler, cache: list[LayerCache], max_batch_size: int):
        self.model, self.sampler, self.cache = model, sampler, cache
        self.device = model.embedding.device
        self.block_size = cache[0][0].shape[1]
        max_blocks = -(-model.max_length // self.block_size)
        self.rows = DecodeRows(max_batch_size, max_blocks, self.block_size, model.config.vocab_size, self.device)

    @torch.inference_mode()
    def launch(self, batch: Batch, previous: Step | None = None) -> Step:
        """Prefills the batch's chunks, decodes its sequences, and draws a token for those that are due.

        previous: the step before, where its tokens may not be known to the host yet
        """
        draws, prompt_logprobs = [], {}
        num_prefilled = len(batch.sampled) - len(batch.decodes)
        if batch.chunks:
            all_tokens = any(chunk.seq.params.prompt_logprobs is not None for chunk in batch.chunks)
            hidden = self._compute_chunks(batch.chunks, all_tokens)
            ends = list(accumulate(chunk.length if all_tokens else 1 for chunk in batch.chunks))
            if num_prefilled:
                last = [end - 1 for c, end in zip(batch.chunks, ends, strict=True) if c.end == c.seq.num_tokens]
                logits = self.model.logits(hidden[to_device(last, torch.int64, self.device)])
                _follow(batch.sampled[:num_prefilled], None)
                draws.append(self.sampler(logits, batch.sampled[:num_prefilled]))
            for chunk, end in zip(batch.chunks, ends, strict=True):
                if chunk.seq.params.prompt_logprobs is not None:
                    prompt_logprobs[chunk.seq.id] = self._prompt_logprobs(chunk, hidden[end - chunk.length : end])
        if batch.decodes:
            draws.append(self._decode(batch.decodes, previous))
        return Step(batch, draws, prompt_logprobs)

    def _decode(self, seqs: list[Sequence], previous: Step | None) -> Draw:
        rows, count = self.rows, len(seqs)

        def newest() -> torch.Tensor:
            """[count] int64: the last token of each whose `token_ids` lack it"""
            return previous.tokens_of(seqs)

        rows.hold(seqs, self._size(count), newest)
        logits, drawn = self._compute_rows(seqs)
        _follow(seqs, previous)
        draw = self.sampler.settle(logits[:count], drawn[:count].clone(), seqs, newest)
        if draw.redrawn:
            rows.tokens[:count] = draw.tokens.clamp(min=0)
        return draw

    def _size(self, count: int) -> int:
        """How many rows a decode of so many sequences computes."""
        return count

    def _compute_rows(self, seqs: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """A decode step of the rows held → (logits, tokens drawn); their first len(seqs) rows are the sequences'."""
        return self._decode_step(len(seqs), self.rows.columns(len(seqs)).used_by(seqs))

    def _decode_step(self, size: int, columns: SamplingColumns) -> tuple[torch.Tensor, torch.Tensor]:
        """From the rows' tokens to those they draw, which are the rows' tokens then; nothing in it is the host's."""
        rows = self.rows
        logits = self.model.logits(self.model(rows.tokens[:size], self.cache, rows.where(size)))
        drawn = self.sampler.draw(logits, columns)
        rows.advance(self.model.kernels, drawn)
        return logits, drawn

    def _compute_chunks(self, chunks: Row[Chunk], all_tokens: bool) -> torch.Tensor:
        """The hidden states of each chunk's last token, or of all tokens, one chunk behind the other."""
        token_ids, where = chunk_tensors(chunks, self.block_size, self.device)
        return self.model(token_ids, self.cache, where, last_only=not all_tokens)

    def _prompt_logprobs(self, chunk: Chunk, hidden: torch.Tensor) -> list[TokenLogprobs]:
        """The log-probabilities of the prompt's tokens that the chunk's tokens predict, in pieces.

        Nothing predicts a prompt's first token, and a prompt's last token predicts none of it.
        """
        seq, pieces = chunk.seq, []
        for start in range(chunk.start + 1, min(chunk.end + 1, seq.num_prompt), PROMPT_LOGPROB_ROWS):
            end = min(start + PROMPT_LOGPROB_ROWS, chunk.end + 1, seq.num_prompt)
            logits = self.model.logits(hidden[start - 1 - chunk.start : end - 1 - chunk.start])
            tokens = to_device(seq.token_ids[start:end], torch.int64, self.device)
            pieces.append(TokenLogprobs(logits, tokens, seq.params.prompt_logprobs))
        return pieces


def _follow(seqs: Row[Sequence], previous: Step | None) -> None:
    """Tells grammars the tokens up to the one that is about to be drawn.

    A grammar is the host's, so a token that only the device knows is waited for. By then this step's forward pass is
    launched, and the device computes it meanwhile. Nothing is preempted between here and the end of the previous step,
    so what a grammar has followed is never taken back.
    """
    constrained = [seq for seq in seqs if seq.grammar is not None]
    newest = previous.drawn() if any(seq.num_pending for seq in constrained) else {}
    for seq in constrained:
        pending = [newest[seq.id]] if seq.num_pending else []
        if pending != [-1]:  # that one has ended
            followed = seq.grammar.num_followed
            # Most often one token: a long text is not copied in every step. A launch that was interrupted, and is
            # made again, has followed the pending one too.
            unfollowed = seq.token_ids[seq.num_prompt + followed :] + pending[max(0, followed - seq.num_generated) :]
            seq.grammar.follow(unfollowed)
