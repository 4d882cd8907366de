"""What choosing a token has to know of a request."""

from __future__ import annotations

from typing import Protocol

from .grammar import Grammar
from .occurrences import Occurrences
from .sampling_params import SamplingParams


class SamplingRow(Protocol):
    """`engine.sequence.Sequence` is one.

    token_ids:   prompt and output as far as the host knows them
    num_tokens:  with the newest token, where it is known to the device alone
    occurrences: counts them, where a penalty asks
    grammar:     where its text must follow a schema; it has followed all tokens, the newest too
    """

    params: SamplingParams
    seed: int
    token_ids: list[int]
    num_tokens: int
    num_prompt: int
    stop_token_ids: frozenset[int]
    occurrences: Occurrences
    grammar: Grammar | None
