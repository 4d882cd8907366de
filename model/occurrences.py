"""How often each token stands in a text that grows."""

from __future__ import annotations

from array import array
from collections.abc import Sequence


class Occurrences:
    """Counts a text's tokens once, and from then on what comes to it: a penalty asks in every step."""

    def __init__(self):
        self._place: dict[int, int] = {}  # by token
        self._tokens, self._times = array("q"), array("q")
        self._read = 0

    def of(self, token_ids: Sequence[int], num_prompt: int) -> tuple[array[int], array[int]]:
        """(tokens, times), of each distinct token: which stand in the text, and how often in its output, which begins
        behind `num_prompt` tokens. Both are its own, and grow with the next call.

        token_ids: those of the call before, and what has come to them since
        """
        assert len(token_ids) >= self._read, "the text is another"
        for i in range(self._read, len(token_ids)):
            place = self._place.setdefault(token_ids[i], len(self._place))
            if place == len(self._tokens):
                self._tokens.append(token_ids[i])
                self._times.append(0)
            self._times[place] += i >= num_prompt
        self._read = len(token_ids)
        return self._tokens, self._times
