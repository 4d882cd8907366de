"""Where the tokens of a forward pass stand: in their sequences, and in the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionMetadata:
    """One forward pass, either a prefill of prompt chunks or a decode of one token a sequence.

    positions:      [tokens] int64, each token's place in its sequence
    slot_mapping:   [tokens] int64, where its key and value go: block · block_size + offset, negative for nowhere
    block_table:    [sequences, max_blocks] int32, each sequence's blocks in order; entries past the context are unused
    context_lens:   [sequences] int32, tokens to attend to, those of this pass included; 0 for a padded row
    query_start:    [sequences + 1] int32, where each sequence's chunk begins among the tokens; None in a decode
    """

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    context_lens: torch.Tensor
    query_start: torch.Tensor | None = None
    max_query_len: int = 1
    max_context_len: int = 1

    @property
    def is_decode(self) -> bool:
        return self.query_start is None

    @property
    def last_tokens(self) -> torch.Tensor:
        """[sequences], of a prefill: where each chunk's last token stands; anywhere for a padded chunk."""
        return (self.query_start[1:] - 1).clamp(min=0)
