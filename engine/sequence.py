"""A request as the scheduler sees it: token ids, how many of them are in the cache, and how it ends."""

from __future__ import annotations

from enum import Enum
from typing import Any

from ..model.occurrences import Occurrences
from ..model.sampling_params import SamplingParams


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Prompt and output tokens of one request.

    id:             its place in the order of arrival
    token_ids:      the prompt, then what has been generated
    num_pending:    tokens after these that a launched step draws, and that are not known yet
    num_computed:   the first so many tokens have their keys and values in the cache, or will by a launched step
    max_length:     tokens, prompt included, at which it ends
    num_cached:     tokens that were found in the prefix cache when it was first admitted, None before
    block_table:    its blocks of the cache, in order, while it runs
    streamed:       whether somebody reads its tokens as they are made; else only when all of them are there
    occurrences:    of each of its tokens, counted where a penalty asks
    grammar:        the model.grammar.Grammar that its output follows, or None
    seed:           what its draws are a function of, together with the draw's number
    finish_reason:  "stop", "length", "abort" or "error", None before the end
    """

    __slots__ = (
        "arrival_time",
        "block_table",
        "finish_reason",
        "grammar",
        "id",
        "logprobs",
        "max_length",
        "num_cached",
        "num_computed",
        "num_pending",
        "num_preemptions",
        "num_prompt",
        "occurrences",
        "params",
        "prompt_logprobs",
        "seed",
        "status",
        "stop_token_ids",
        "streamed",
        "token_ids",
    )

    def __init__(
        self,
        id: int,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        max_length: int,
        seed: int = 0,
        stop_token_ids: frozenset[int] = frozenset(),
        streamed: bool = True,
        grammar: Any = None,
        arrival_time: float = 0.0,
    ):
        self.id = id
        self.token_ids = list(prompt_ids)
        self.num_prompt = len(prompt_ids)
        self.params = params
        self.max_length = max_length
        self.seed = seed
        self.stop_token_ids = stop_token_ids
        self.streamed = streamed
        self.grammar = grammar
        self.arrival_time = arrival_time
        self.occurrences = Occurrences()
        self.status = Status.WAITING
        self.finish_reason: str | None = None
        self.num_pending = 0
        self.num_computed = 0
        self.num_cached: int | None = None
        self.num_preemptions = 0
        self.block_table: list[int] = []
        self.logprobs: list = []
        self.prompt_logprobs: list = []

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_tokens(self) -> int:
        """Its tokens, those included that are not known yet."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def work_left(self) -> int:
        """Tokens still to be computed if it runs to its maximum: prompt left + max_tokens − generated."""
        return self.max_length - self.num_computed

    @property
    def error(self) -> str | None:
        """What has ended it, where its finish_reason is "error"."""
        if self.finish_reason != "error":
            return None
        of_grammar = self.grammar.error if self.grammar is not None else None
        if of_grammar is None and self.grammar is not None and self.params.min_tokens:
            return (
                "the model's logits were not numbers (NaN or infinite), or the schema allowed nothing but a stop token "
                f"before min_tokens={self.params.min_tokens}"
            )
        return of_grammar or "the model's logits were not numbers (NaN or infinite)"

    def __repr__(self) -> str:
        return f"Sequence({self.id}, {self.status.value}, {self.num_prompt}+{self.num_generated} tokens)"
