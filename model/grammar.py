"""Texts that follow a JSON schema: which tokens may come next, as llguidance says (arXiv:2501.10868)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, cached_property, lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

MAX_COMPILED = 64
"""Schemas that are kept compiled. One of the longest takes a quarter of a second to compile."""

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
"""Between two symbols of JSON. Without a bound a model may write blanks up to max_tokens; 64 indent 15 levels by 4.
llguidance keeps to the bound since 1.8.
"""


class Grammar:
    """One text's way through a schema: `follow` takes in its tokens, `masks` says which may be the next.

    num_followed:  how many of the text's tokens it has taken in
    error:         why it cannot go on, None while it can
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, schema: str):
        self._matcher, self._vocab_size, self._schema = matcher, vocab_size, schema
        self.num_followed = 0

    def follow(self, token_ids: Sequence[int]) -> None:
        """Takes in the text's next tokens, every one a possible one."""
        if not self._matcher.is_stopped():  # else the new token is its end
            self._matcher.consume_tokens(list(token_ids))
        self.num_followed += len(token_ids)

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may come; it is known once `masks` has looked."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str | None:
        return _refusal(self._schema, self._matcher) if self._matcher.is_error() else None


class Grammars:
    """Begins texts that follow schemas. Each schema is compiled once, as long as few others come between.

    tokenizer:      None where the checkpoint has none
    eos_token_ids:  the tokens that may end a text
    vocab_size:     how many logits there are
    """

    def __init__(self, tokenizer: Tokenizer | None, eos_token_ids: Iterable[int], vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos_token_ids = sorted(token for token in eos_token_ids if token < vocab_size)
        self._compiled = lru_cache(MAX_COMPILED)(self._compile)

    def begin(self, schema: str) -> Grammar:
        """A text that is still empty; ValueError where the schema, a JSON text, cannot be followed."""
        return Grammar(self._compiled(schema).deep_copy(), self._vocabulary.vocab_size, schema)

    def load(self) -> None:
        """Does now what the first text would wait for: 2 s at 150000 tokens, most of it with the interpreter's lock."""
        self._vocabulary  # noqa: B018 — it is kept

    @cached_property
    def _vocabulary(self) -> LLTokenizer | str:
        """Or what a schema needs that is not there."""
        if find_spec("llguidance") is None:
            return "llguidance, which is not installed (pip install micro-vllm[server])"
        if self._tokenizer is None:
            return "a tokenizer, and this checkpoint has none"
        if not self._eos_token_ids:
            return "an end-of-sequence token, and this checkpoint has none"
        from llguidance import LLTokenizer
        from llguidance.hf import from_tokenizer

        fast, slices = self._tokenizer.fast, LLTokenizer.json_slices()
        size = max(self._vocab_size, len(fast))  # a tokenizer may know more tokens than have logits
        try:
            return from_tokenizer(fast, size, eos_token=self._eos_token_ids, slices=slices)
        except ValueError as error:
            return f"a tokenizer that llguidance knows, and this one it does not: {error}"

    def _compile(self, schema: str) -> LLMatcher:
        vocabulary = self._vocabulary
        if isinstance(vocabulary, str):
            raise ValueError(f"json_schema={_shortened(schema)} needs {vocabulary}")
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
        except ValueError as error:
            raise ValueError(f"json_schema={_shortened(schema)} is not valid: {error}") from error
        matcher = LLMatcher(vocabulary, grammar, log_level=0)  # without the interpreter's lock
        if matcher.is_error():
            raise ValueError(_refusal(schema, matcher))
        return matcher


def masks(grammars: Sequence[Grammar]) -> np.ndarray:
    """The tokens that may come next, the end-of-sequence ones where a text may end; none after an error.

    grammars:  of one Grammars
    → [grammars, bytes] uint8: token t is bit t mod 8 of byte t // 8, and some bits may follow that are no token's
    """
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

    bits = allocate_token_bitmask(len(grammars), grammars[0]._vocab_size)
    # Some take milliseconds, most some hundred microseconds: by several threads, without the interpreter's lock.
    fill_next_token_bitmask_par(_executor(), [(grammar._matcher, i) for i, grammar in enumerate(grammars)], bits)
    bits[[i for i, grammar in enumerate(grammars) if grammar._matcher.is_error()]] = 0
    return bits.astype("<i4", copy=False).view(np.uint8)


@cache
def _executor() -> LLExecutor:
    from llguidance import LLExecutor

    return LLExecutor()


def _refusal(schema: str, matcher: LLMatcher) -> str:
    """What llguidance finds wrong, without the state of its parser."""
    reason = matcher.get_error().split("\n<state>")[0]
    return f"json_schema={_shortened(schema)} cannot be followed: {reason}"


def _shortened(schema: str) -> str:
    return schema if len(schema) <= 100 else f"{schema[:100]}…"
