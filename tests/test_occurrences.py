"""A text's tokens are counted as it grows, each of them once."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from microvllm.model.occurrences import Occurrences


class Watched(list):
    """reads: how many entries were asked for"""

    reads = 0

    def __getitem__(self, place):
        self.reads += 1
        return super().__getitem__(place)


@given(st.lists(st.integers(0, 200), max_size=300), st.integers(0, 300), st.lists(st.integers(0, 300), max_size=5))
def test_they_are_those_of_the_whole_text(text, num_prompt, stops):
    occurrences = Occurrences()
    for stop in sorted(stops):
        known = text[:stop]
        tokens, times = occurrences.of(known, num_prompt)
        assert sorted(tokens.tolist()) == sorted(set(known))
        output = Counter(known[num_prompt:])
        assert times.tolist() == [output[token] for token in tokens.tolist()]


def test_no_token_is_read_again():
    occurrences, text = Occurrences(), Watched(range(1000))
    occurrences.of(text, 10)
    before = text.reads
    text.append(7)
    tokens, times = occurrences.of(text, 10)
    assert text.reads - before <= 3 and times[tokens.tolist().index(7)] == 1
