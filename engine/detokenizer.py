"""Text from a stream of tokens, a whole character at a time, up to a stop string."""

from __future__ import annotations

import codecs

from ..model.tokenizer import Tokenizer


class Detokenizer:
    """The text of one request. `text` only ever grows, by what `push` and `finish` return.

    Bytes that do not complete a UTF-8 character wait for the next token, and are dropped at the end. Text that may turn
    out to begin a stop string waits too.

    stop:     strings that end the text; none of them is shown
    goes_on:  whether it goes on from another text, so that a space at its beginning lies between the two
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), *, goes_on: bool = False):
        self._token_bytes = tokenizer.token_bytes
        self._strip_space = tokenizer.strips_leading_space and not goes_on
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = stop
        self._held = ""
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._shown)

    def push(self, token_id: int, *, look_for_stop: bool = True) -> tuple[str, bool]:
        """The text that the token completes, and whether a stop string ends it there.

        look_for_stop: False while the request must not stop yet; what it holds by then is not searched later
        """
        new = self._utf8.decode(self._token_bytes(token_id))
        if self._strip_space and new:
            new, self._strip_space = new.removeprefix(" "), False
        if not look_for_stop:
            return self._show(new), False
        self._held += new
        ends = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            piece, self._held = self._held[: min(ends)], ""
            return self._show(piece), True
        keep = self._beginning_of_stop()
        piece, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._show(piece), False

    def finish(self) -> str:
        """What was held back and turned out to be text after all."""
        piece, self._held = self._held, ""
        return self._show(piece)

    def _beginning_of_stop(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _show(self, piece: str) -> str:
        if piece:
            self._shown.append(piece)
        return piece
