"""The chunks of prompts that are prefilled together, as the device reads them."""

from __future__ import annotations

from collections.abc import Sequence as Many
from itertools import accumulate

import numpy as np
import torch

from ..model.attention_metadata import AttentionMetadata
from ..model.transfer import to_device
from .scheduler import Chunk


def chunk_tensors(
    chunks: Many[Chunk], block_size: int, device: torch.device, *, tokens: int = 0, rows: int = 0
) -> tuple[torch.Tensor, AttentionMetadata]:
    """(The token ids of the chunks, one chunk behind the other; where they stand), padded to `tokens` and `rows`.

    A padded token is token 0, has no slot and is part of no chunk; a padded row is a chunk without tokens.
    """
    lengths = [chunk.length for chunk in chunks]
    ends = list(accumulate(lengths))
    integers = np.zeros((3, max(tokens, ends[-1])), np.int64)
    ids, positions, slots = integers
    slots[ends[-1] :] = -1
    for chunk, end in zip(chunks, ends, strict=True):
        place = slice(end - chunk.length, end)
        ids[place] = chunk.seq.token_ids[chunk.start : chunk.end]
        positions[place] = np.arange(chunk.start, chunk.end)
        block, offset = np.divmod(positions[place], block_size)
        slots[place] = np.array(chunk.seq.block_table)[block] * block_size + offset
    width = max(len(chunk.seq.block_table) for chunk in chunks)
    table = [c.seq.block_table + [-1] * (width - len(c.seq.block_table)) for c in chunks]
    more = rows - len(chunks)
    table += [[-1] * width] * more
    token_ids, positions, slots = to_device(integers, torch.int64, device)
    where = AttentionMetadata(
        positions=positions,
        slot_mapping=slots,
        block_table=to_device(table, torch.int32, device),
        context_lens=to_device([chunk.end for chunk in chunks] + [0] * more, torch.int32, device),
        query_start=to_device([0, *ends] + [ends[-1]] * more, torch.int32, device),
        max_query_len=max(lengths),
        max_context_len=max(chunk.end for chunk in chunks),
    )
    return token_ids, where


class ChunkRows:
    """What a padded prefill reads of its chunks, in tensors that never move: a CUDA graph can hold them.

    max_tokens:  of all chunks together
    max_rows:    chunks
    max_blocks:  cache blocks of a sequence at most
    """

    def __init__(self, max_tokens: int, max_rows: int, max_blocks: int, block_size: int, device: torch.device):
        self._block_size, self._device = block_size, device
        self._token_ids = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._positions = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._slots = torch.full((max_tokens,), -1, dtype=torch.int64, device=device)
        self._block_table = torch.full((max_rows, max_blocks), -1, dtype=torch.int32, device=device)
        self._contexts = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._starts = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)

    def hold(self, chunks: Many[Chunk], size: int) -> None:
        """The next prefill of `size` tokens computes these chunks, and the rest of it is padded."""
        rows = len(self._contexts)
        token_ids, where = chunk_tensors(chunks, self._block_size, self._device, tokens=size, rows=rows)
        self._token_ids[:size] = token_ids
        self._positions[:size] = where.positions
        self._slots[:size] = where.slot_mapping
        self._contexts.copy_(where.context_lens)
        self._starts.copy_(where.query_start)
        # What stays behind these columns lies past the contexts.
        self._block_table[:, : where.block_table.shape[1]] = where.block_table

    def tensors(self, size: int, max_context_len: int) -> tuple[torch.Tensor, AttentionMetadata]:
        """(The first `size` token ids, where they stand); any chunk may be as long as all of them."""
        where = AttentionMetadata(
            positions=self._positions[:size],
            slot_mapping=self._slots[:size],
            block_table=self._block_table,
            context_lens=self._contexts,
            query_start=self._starts,
            max_query_len=size,
            max_context_len=max_context_len,
        )
        return self._token_ids[:size], where
