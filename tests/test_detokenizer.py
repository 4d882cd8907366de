"""Streamed text: whole characters, pieces that join to the whole, stop strings wherever tokens cut them."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from microvllm.engine.detokenizer import Detokenizer
from microvllm.model.checkpoint import open_checkpoint
from microvllm.model.tokenizer import Tokenizer

from .test_tokenizer import sentencepiece


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request):
    """SmolLM2's, and one like Llama 2's that drops a leading space."""
    if request.param == "byte-level":
        return open_checkpoint("smollm2").tokenizer()
    return Tokenizer(sentencepiece())


@pytest.fixture(scope="module")
def smollm2():
    return open_checkpoint("smollm2").tokenizer()


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    strips_leading_space = False

    @staticmethod
    def token_bytes(token_id: int) -> bytes:
        return bytes([token_id])


class Words:
    """A tokenizer whose tokens are the texts that it is given."""

    strips_leading_space = False

    def __init__(self, *words: str):
        self.words = words

    def token_bytes(self, token_id: int) -> bytes:
        return self.words[token_id].encode()


def stream(detokenizer: Detokenizer, ids) -> tuple[list[str], bool]:
    """The pieces up to a stop or the end, and whether there was a stop."""
    pieces = []
    for token in ids:
        piece, stopped = detokenizer.push(token)
        pieces.append(piece)
        if stopped:
            return pieces, True
    return [*pieces, detokenizer.finish()], False


def words_until(stop: tuple[str, ...], *words: str) -> tuple[list[str], bool]:
    return stream(Detokenizer(Words(*words), stop), range(len(words)))


def complete_text(tokenizer, ids) -> str:
    """All that the tokens say, without the beginning of a character at their end."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(map(tokenizer.token_bytes, ids)))
    return text.removeprefix(" ") if tokenizer.strips_leading_space else text


def text_up_to_stop(tokenizer, ids, stop: tuple[str, ...]) -> tuple[str, bool]:
    """By brute force: after each token the whole text is decoded and searched anew."""
    for end in range(len(ids) + 1):
        text = complete_text(tokenizer, ids[:end])
        found = [text.index(s) for s in stop if s in text]
        if found:
            return text[: min(found)], True
    return complete_text(tokenizer, ids), False


def random_ids(data, tokenizer) -> list[int]:
    """Any tokens, or those of a text in which characters take several tokens."""
    size = tokenizer.vocab_size
    if data.draw(st.booleans()):
        return data.draw(st.lists(st.integers(0, size + 2), max_size=40))
    return tokenizer.encode(data.draw(st.text(st.sampled_from("ab é漢字👩‍👧🇫🇷\n"), max_size=12)))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_text_of_the_tokens(tokenizer, data):
    ids = random_ids(data, tokenizer)
    detokenizer = Detokenizer(tokenizer)
    pieces, stopped = stream(detokenizer, ids)
    assert not stopped
    assert "".join(pieces) == detokenizer.text == complete_text(tokenizer, ids)
    decoded = tokenizer.decode(ids)
    assert decoded.startswith(detokenizer.text)
    assert decoded[len(detokenizer.text) :] in ("", "�")  # what is missing is less than a character


# SmolLM2 has no token for some bytes: of control characters, and of what begins at U+40000.
@given(text=st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"]), max_size=30))
@settings(max_examples=150, deadline=None)
def test_a_text_that_is_encoded_streams_back_without_half_a_character(smollm2, text):
    ids = smollm2.encode(text)
    assume(all(map(smollm2.token_bytes, ids)))  # a text that names a special token has it encoded, and none is shown
    pieces, _ = stream(Detokenizer(smollm2), ids)
    assert "".join(pieces) == text
    assert sum(piece.count("�") for piece in pieces) == text.count("�")


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_stop_strings_are_found_as_by_searching_the_whole_text(tokenizer, data):
    ids = random_ids(data, tokenizer)
    text = complete_text(tokenizer, ids)
    cut = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 6)).map(lambda at: text[at[0] :][: at[1]])
    stop = tuple(data.draw(st.lists(st.one_of(cut, st.text("ab é", max_size=3)).filter(bool), min_size=1, max_size=4)))
    detokenizer = Detokenizer(tokenizer, stop)
    pieces, stopped = stream(detokenizer, ids)
    assert ("".join(pieces), stopped) == text_up_to_stop(tokenizer, ids, stop)
    assert "".join(pieces) == detokenizer.text
    assert not any(s in detokenizer.text for s in stop)


@given(text=st.text("ab", max_size=30), stop=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_stop_strings_of_two_letters_overlap_in_every_way(text, stop):
    ids = list(text.encode())
    pieces, stopped = stream(Detokenizer(Bytes(), tuple(stop)), ids)
    assert ("".join(pieces), stopped) == text_up_to_stop(Bytes(), ids, tuple(stop))


class TestCharacters:
    @pytest.mark.parametrize("character", ["é", "漢", "👩", "🇫"])
    def test_one_is_shown_with_its_last_byte(self, character):
        size = len(character.encode())
        pieces, _ = stream(Detokenizer(Bytes()), character.encode())
        assert pieces == [""] * (size - 1) + [character, ""]

    def test_emoji_and_chinese_of_several_tokens_come_whole(self, smollm2):
        text = "漢字 and 👩‍👧 🇫🇷!"
        ids = smollm2.encode(text)
        assert len(ids) > len(text)
        pieces, _ = stream(Detokenizer(smollm2), ids)
        assert "".join(pieces) == text
        assert "漢" in pieces and "👩" in pieces

    def test_bytes_that_are_never_completed_are_dropped_at_the_end(self):
        detokenizer = Detokenizer(Bytes())
        pieces, _ = stream(detokenizer, "a漢".encode()[:-1])
        assert (pieces, detokenizer.text) == (["a", "", "", ""], "a")

    def test_bytes_that_are_no_character_are_shown_as_such(self):
        pieces, _ = stream(Detokenizer(Bytes()), b"a\xffb\xe6\xbcc")
        assert "".join(pieces) == b"a\xffb\xe6\xbcc".decode(errors="replace") == "a�b�c"

    def test_one_leading_space_is_dropped_where_the_tokenizer_says_so(self):
        tokenizer = Words("", " a", " b")
        tokenizer.strips_leading_space = True
        assert stream(Detokenizer(tokenizer), [0, 1, 2, 1])[0] == ["", "a", " b", " a", ""]
        assert stream(Detokenizer(tokenizer, goes_on=True), [0, 1, 2, 1])[0] == ["", " a", " b", " a", ""]


class TestStop:
    def test_across_token_borders(self):
        assert words_until(("STOP",), "one S", "T", "OP two") == (["one ", "", ""], True)

    def test_in_the_middle_of_a_token(self):
        assert words_until(("STOP",), "one STOP two") == (["one "], True)

    def test_right_at_the_beginning(self):
        assert words_until(("a",), "a b") == ([""], True)

    def test_what_turns_out_to_be_text_is_released(self):
        assert words_until(("STOP",), "one ST", "ART", " ST") == (["one ", "START", " ", "ST"], False)

    def test_a_beginning_within_a_beginning_is_held_on_to(self):
        assert words_until(("aab",), "a", "a", "a", "b") == (["", "", "a", ""], True)

    def test_the_earliest_of_several_wins_whatever_their_order(self):
        for stop in (("two", "one"), ("one", "two")):
            assert words_until(stop, "zero one two") == (["zero "], True)

    def test_overlapping_stops_in_one_token(self):
        assert words_until(("bcd", "abc"), "xabcd") == (["x"], True)

    def test_one_that_begins_another_ends_the_text_at_once(self):
        assert words_until(("\n\n", "\n"), "a", "\n", "b") == (["a", ""], True)

    def test_the_longest_beginning_is_held_back_among_several(self):
        assert words_until(("lo world", "hello there"), "hello", " world") == (["", "hel"], True)

    def test_of_several_characters_of_several_bytes(self):
        detokenizer = Detokenizer(Bytes(), ("漢字",))
        pieces, stopped = stream(detokenizer, "a漢漢字b".encode())
        assert ("".join(pieces), stopped) == ("a漢", True)

    def test_none_is_looked_for_while_the_request_may_not_stop(self):
        detokenizer = Detokenizer(Words("a STOP", " b", " ST", "OP"), ("STOP",))
        assert detokenizer.push(0, look_for_stop=False) == ("a STOP", False)
        assert detokenizer.push(1) == (" b", False)
        assert detokenizer.push(2) == (" ", False)
        assert detokenizer.push(3) == ("", True)
        assert detokenizer.text == "a STOP b "

    def test_what_was_shown_before_it_was_looked_for_is_not_part_of_one(self):
        detokenizer = Detokenizer(Words("ST", "OP"), ("STOP",))
        assert detokenizer.push(0, look_for_stop=False) == ("ST", False)
        assert detokenizer.push(1) == ("OP", False)
