"""Log-probabilities as the two kinds of completion show them."""

from __future__ import annotations

from collections.abc import Iterable

from ...model.logprobs import Logprobs
from ...model.tokenizer import Tokenizer
from .responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob


def _token_bytes(tokenizer: Tokenizer | None, token_id: int) -> bytes:
    """A special token, which adds nothing to a text, is shown by its name."""
    if tokenizer is None:
        return f"token_id:{token_id}".encode()
    return tokenizer.token_bytes(token_id) or tokenizer.token_name(token_id).encode()


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
    """Writes those of one text, in pieces; where a token begins is counted in characters from the text's beginning.

    from_prompt: whether the text begins with the prompt, and not behind it
    """

    def __init__(self, tokenizer: Tokenizer | None, *, from_prompt: bool):
        self._tokenizer = tokenizer
        self._offset = 0
        self._strip_space = tokenizer is not None and tokenizer.strips_leading_space and from_prompt

    def write(self, token_ids: Iterable[int], entries: Iterable[Logprobs | None]) -> CompletionLogprobs:
        """None stands for a token that nothing predicts."""
        written = CompletionLogprobs(text_offset=[], tokens=[], token_logprobs=[], top_logprobs=[])
        for token_id, entry in zip(token_ids, entries, strict=True):
            written.text_offset.append(self._offset)
            written.tokens.append(_token_text(self._tokenizer, token_id))
            written.token_logprobs.append(None if entry is None else entry.logprob)
            written.top_logprobs.append(None if entry is None else self._top(entry))
            if self._tokenizer is not None:
                shown = self._tokenizer.token_bytes(token_id)
                if self._strip_space and shown:
                    shown, self._strip_space = shown.removeprefix(b" "), False
                # The bytes that begin a character of UTF-8.
                self._offset += sum(byte & 0xC0 != 0x80 for byte in shown)
        return written

    def _top(self, entry: Logprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in _likeliest(entry):
            top.setdefault(_token_text(self._tokenizer, token), logprob)
        return top


def chat_logprobs(tokenizer: Tokenizer | None, entries: Iterable[Logprobs], top: int) -> ChatLogprobs:
    """top: how many of the likeliest were asked for"""

    def shown(token_id: int, logprob: float) -> TopLogprob:
        data = _token_bytes(tokenizer, token_id)
        return TopLogprob(token=data.decode(errors="replace"), logprob=logprob, bytes=list(data))

    return ChatLogprobs(
        content=[
            TokenLogprob(
                **shown(entry.token_id, entry.logprob).model_dump(),
                top_logprobs=[shown(*pair) for pair in entry.top[:top]],
            )
            for entry in entries
        ]
    )
