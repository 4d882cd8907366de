"""The sequences that decode together, as the device holds them: a row each, which advances there from step to step."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many

import torch

from ..kernels.kernel_set import KernelSet
from ..model.attention_metadata import AttentionMetadata
from ..model.sampling_columns import SamplingColumns, column_values
from ..model.transfer import to_device
from .sequence import Sequence


class DecodeRows:
    """Everything that a decode step reads of its sequences, in tensors that never move: a CUDA graph can hold them.

    `hold` says which sequences the next step decodes. As long as these are the ones of the step before, only new blocks
    travel to the device; else all that the host knows does, and the tokens that it does not know are taken from the
    device. `advance` ends a step.

    max_rows:    sequences at most
    max_blocks:  cache blocks of a sequence at most
    """

    def __init__(self, max_rows: int, max_blocks: int, block_size: int, vocab_size: int, device: torch.device):
        self.block_size, self.vocab_size, self.device = block_size, vocab_size, device
        self._integers = torch.zeros(6, max_rows, dtype=torch.int64, device=device)
        self._floats = torch.zeros(3, max_rows, dtype=torch.float32, device=device)
        self.tokens, self._positions, self._slots, seed, index, top_k = self._integers
        temperature, top_p, min_p = self._floats
        self._columns = SamplingColumns(temperature, top_k, top_p, min_p, seed, index)
        self._contexts = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._block_table = torch.full((max_rows, max_blocks), -1, dtype=torch.int32, device=device)
        self._held: list[tuple[int, int, int]] = []  # (id, preemptions, tokens) of each row's sequence in the last step
        self._num_blocks: list[int] = []

    def hold(self, seqs: Many[Sequence], size: int, newest: Callable[[], torch.Tensor]) -> None:
        """Row i of the next step is seqs[i], computing its last token; rows from there to `size` are padded.

        newest: gives the last tokens [len(seqs)] int64, on the device, that the sequences' `token_ids` lack; it is
                called where rows are written anew and one lacks its token
        """
        if [(seq.id, seq.num_preemptions, seq.num_tokens - 1) for seq in seqs] == self._held:
            self._extend(seqs)
        else:
            self._compose(seqs, size, newest)
        self._held = [(seq.id, seq.num_preemptions, seq.num_tokens) for seq in seqs]
        self._num_blocks = [len(seq.block_table) for seq in seqs]

    def _compose(self, seqs: Many[Sequence], size: int, newest: Callable[[], torch.Tensor]) -> None:
        contexts = [seq.num_tokens for seq in seqs]
        places = [divmod(n - 1, self.block_size) for n in contexts]
        slots = [s.block_table[block] * self.block_size + i for s, (block, i) in zip(seqs, places, strict=True)]
        columns, floats = column_values(seqs, self.vocab_size)
        integers = [[seq.token_ids[-1] for seq in seqs], [n - 1 for n in contexts], slots, *columns]
        # A padded row has no context and no slot, and is greedy. Its other columns may hold anything that is valid.
        padding = [0] * (size - len(seqs))
        integers = [column + ([-1] * len(padding) if column is slots else padding) for column in integers]
        self._integers[:, :size] = to_device(integers, torch.int64, self.device)
        self._floats[:, :size] = to_device([column + padding for column in floats], torch.float32, self.device)
        self._contexts[:size] = to_device(contexts + padding, torch.int32, self.device)
        width = max(len(seq.block_table) for seq in seqs)
        table = [seq.block_table + [-1] * (width - len(seq.block_table)) for seq in seqs]
        self._block_table[: len(seqs), :width] = to_device(table, torch.int32, self.device)
        known = [seq.num_pending == 0 for seq in seqs]
        if not all(known):
            known = to_device(known, torch.bool, self.device)
            # A row without a token has ended, and whatever it computes now is not used.
            self.tokens[: len(seqs)] = torch.where(known, self.tokens[: len(seqs)], newest().clamp(min=0))

    def _extend(self, seqs: Many[Sequence]) -> None:
        """Enters the blocks that sequences got for the token they compute now, which is the first in its block."""
        grown = [i for i, seq in enumerate(seqs) if len(seq.block_table) > self._num_blocks[i]]
        if not grown:
            return
        blocks = [seqs[i].block_table[-1] for i in grown]
        entries = [grown, [self._num_blocks[i] for i in grown], blocks, [b * self.block_size for b in blocks]]
        row, column, block, slot = to_device(entries, torch.int64, self.device)
        self._block_table[row, column] = block.int()
        self._slots[row] = slot

    def where(self, size: int) -> AttentionMetadata:
        """Of the first `size` rows."""
        return AttentionMetadata(
            positions=self._positions[:size],
            slot_mapping=self._slots[:size],
            block_table=self._block_table[:size],
            context_lens=self._contexts[:size],
        )

    def columns(self, size: int) -> SamplingColumns:
        """What the first `size` rows ask of the draw, with every filter, whether a row uses it or not."""
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "index")
        return SamplingColumns(**{name: getattr(self._columns, name)[:size] for name in names})

    def advance(self, kernels: KernelSet, drawn: torch.Tensor) -> None:
        """Each row goes on by the token that it drew.   drawn [size] int64"""
        size, where = len(drawn), self.where(len(drawn))
        kernels.advance_decode(
            drawn,
            self.tokens[:size],
            where.positions,
            where.context_lens,
            self._columns.index[:size],
            where.slot_mapping,
            where.block_table,
            self.block_size,
        )
