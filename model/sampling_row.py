"""What choosing a token has to know of a request."""

from __future__ import annotations

from typing import Protocol

from .sampling_params import SamplingParams


class SamplingRow(Protocol):
    """`engine.sequence.Sequence` is one.

    token_ids:   prompt and output as far as the host knows them
    num_tokens:  with the newest token, where it is known to the device alone
    """

    params: SamplingParams
    seed: int
    token_ids: list[int]
    num_tokens: int
    num_prompt: int
    stop_token_ids: frozenset[int]
