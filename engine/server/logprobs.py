"""Log-probabilities as the two kinds of completion show them."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from ...model.logprobs import Logprobs
from ...model.tokenizer import Tokenizer
from .responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob


def _token_bytes(tokenizer: Tokenizer | None, token_id: int) -> bytes:
    """A special token, which adds nothing to a text, is shown by its name."""
    if tokenizer is None:
        return f"token_id:{token_id}".encode()
    return tokenizer.spelt_bytes(token_id)


def _token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    """A token that is not whole characters is shown by its bytes, so that different tokens differ."""
    data = _token_bytes(tokenizer, token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _likeliest(entry: Logprobs) -> list[tuple[int, float]]:
    """With the token itself, which may not be among them."""
    chosen = (entry.token_id, entry.logprob)
    return entry.top if entry.token_id in (token for token, _ in entry.top) else [*entry.top, chosen]


class CompletionLogprobsWriter:
    """Writes those of one text, in pieces; where a token begins is counted in characters from the answer's beginning.

    before:  characters of the answer that come before the text
    prompt:  what was asked, where the text is its echo
    """

    def __init__(self, tokenizer: Tokenizer | None, *, before: int = 0, prompt: str | list[int] | None = None):
        self._tokenizer = tokenizer
        self._offset = before
        self._asked = prompt if isinstance(prompt, str) else ""
        self._named = 0  # where in it the last special token ends
        self._strip_space = tokenizer is not None and tokenizer.strips_leading_space and prompt is not None
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(
        self,
        token_ids: Iterable[int],
        entries: Iterable[Logprobs | None],
        behind: CompletionLogprobs | None = None,
    ) -> CompletionLogprobs:
        """None stands for a token that nothing predicts.   behind: what they are added to, and new lists if None"""
        written = behind or CompletionLogprobs(text_offset=[], tokens=[], token_logprobs=[], top_logprobs=[])
        for token_id, entry in zip(token_ids, entries, strict=True):
            written.text_offset.append(self._pass(token_id))
            written.tokens.append(_token_text(self._tokenizer, token_id))
            written.token_logprobs.append(None if entry is None else entry.logprob)
            written.top_logprobs.append(None if entry is None else self._top(entry))
        return written

    def _pass(self, token_id: int) -> int:
        """Goes on behind the token → where the character is that it begins with or within."""
        if self._tokenizer is None:
            return self._offset
        data = self._tokenizer.token_bytes(token_id)
        if not data:
            name = self._tokenizer.token_name(token_id)
            # A text may name a special token. One that the tokenizer has added at the beginning is not in it.
            at = self._asked.find(name, self._named, None if self._offset else len(name))
            if at < 0:
                return self._offset
            # The offset is counted in what the tokenizer made of the text, which may have fewer characters.
            self._offset = self._named = at + len(name)
            return at
        if self._strip_space:
            data, self._strip_space = data.removeprefix(b" "), False
        self._offset += len(self._utf8.decode(data[:1]))
        # The first byte ends the last character, or waits for the rest of the next one.
        ends = data and not self._utf8.getstate()[0]
        begin = self._offset - 1 if ends else self._offset
        self._offset += len(self._utf8.decode(data[1:]))
        return begin

    def _top(self, entry: Logprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in _likeliest(entry):
            top.setdefault(_token_text(self._tokenizer, token), logprob)
        return top


def chat_logprobs(tokenizer: Tokenizer | None, entries: Iterable[Logprobs], top: int) -> ChatLogprobs:
    """top: how many of the likeliest were asked for"""

    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        data = _token_bytes(tokenizer, token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    return ChatLogprobs(
        content=[
            TokenLogprob(
                **shown(entry.token_id, entry.logprob),
                top_logprobs=[TopLogprob(**shown(*pair)) for pair in entry.top[:top]],
            )
            for entry in entries
        ]
    )
