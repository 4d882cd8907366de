"""What ends an answer, and what is said of it then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ..checkpoints import edit_json
from ..small_engine import ids, save_tokenizer
from ..small_models import VOCAB_SIZE
from .engines import BLOCK_SIZE, make_engine


@pytest.fixture(scope="module")
def free(shared_engine):
    """What the model says after "hello" if nothing stops it; its first five tokens differ."""
    output = shared_engine.generate("hello", max_tokens=16)[0]
    assert len(set(output.token_ids[:5])) == 5
    return output


class TestEnds:
    @pytest.mark.parametrize("source", ["config.json", "generation_config.json", "tokenizer", "stop_token_ids"])
    def test_an_end_token_is_kept_among_the_ids_and_not_shown(self, source, folder, free, tmp_path):
        end = free.token_ids[3]
        copy = shutil.copytree(folder, tmp_path / "model")
        options = {"stop_token_ids": [end]} if source == "stop_token_ids" else {}
        if source == "tokenizer":
            save_tokenizer(copy, eos=word(copy, end))
        elif not options:
            edit_json(copy / source, eos_token_id=[end])
        engine = make_engine(copy)
        (output,) = engine.generate("hello", max_tokens=16, **options)
        assert (output.finish_reason, output.token_ids) == ("stop", free.token_ids[:4])
        assert output.text == engine.tokenizer.decode(free.token_ids[:3])
        assert "".join(piece for _, piece in engine.stream_generate("hello", max_tokens=16, **options)) == output.text
        if not options:
            (going_on,) = engine.generate("hello", max_tokens=16, ignore_eos=True)
            assert (going_on.finish_reason, going_on.token_ids) == ("length", free.token_ids)

    def test_all_sources_of_end_tokens_are_joined(self, folder, free, tmp_path):
        copy = shutil.copytree(folder, tmp_path / "model")
        edit_json(copy / "config.json", eos_token_id=free.token_ids[4])
        edit_json(copy / "generation_config.json", eos_token_id=[free.token_ids[3], VOCAB_SIZE - 1])
        save_tokenizer(copy, eos=word(copy, free.token_ids[2]))
        engine = make_engine(copy)
        for allowed, length in ((free.token_ids[2], 4), (free.token_ids[3], 5)):
            assert len(engine.generate("hello", max_tokens=16)[0].token_ids) == 3
            prompt = engine.tokenizer.encode("hello") + free.token_ids[: length - 1]
            assert engine.generate(prompt, max_tokens=16)[0].token_ids == free.token_ids[length - 1 : length]
            assert allowed in prompt

    def test_min_tokens_puts_an_end_token_off(self, engine, free):
        end = free.token_ids[1]
        (output,) = engine.generate("hello", max_tokens=16, min_tokens=5, stop_token_ids=[end])
        assert output.token_ids[0] == free.token_ids[0]
        assert len(output.token_ids) >= 5 and end not in output.token_ids[:5]

    def test_a_stop_string_ends_the_text_across_tokens(self, engine, free):
        pieces = [engine.tokenizer.decode([token]) for token in free.token_ids]
        stop = pieces[2][-1] + pieces[3][0]
        cut = free.text.index(stop)
        (output,) = engine.generate("hello", max_tokens=16, stop=stop)
        assert (output.finish_reason, output.text) == ("stop", free.text[:cut])
        assert output.token_ids == free.token_ids[: len(output.token_ids)] and len(output.token_ids) <= 4
        assert "".join(piece for _, piece in engine.stream_generate("hello", max_tokens=16, stop=stop)) == output.text

    def test_a_stop_string_in_the_last_token_is_a_stop(self, engine, free):
        last = engine.tokenizer.decode(free.token_ids[3:4])
        (output,) = engine.generate("hello", max_tokens=4, stop=last)
        assert (output.finish_reason, output.text) == ("stop", free.text[: free.text.index(last)])

    def test_min_tokens_puts_a_stop_string_off(self, engine, free):
        stop = free.text[0]
        (output,) = engine.generate("hello", max_tokens=16, stop=stop, min_tokens=6)
        assert len(output.token_ids) >= 6 and output.text.startswith(stop)

    def test_text_that_only_began_a_stop_string_is_shown_at_the_end(self, engine, free):
        short = engine.tokenizer.decode(free.token_ids[:4])
        stop = short[-1] + "\x00"
        pairs = list(engine.stream_generate("hello", max_tokens=4, stop=stop))
        assert "".join(piece for _, piece in pairs) == short

    @pytest.mark.parametrize("max_tokens", [1, 2, 7])
    def test_max_tokens(self, engine, max_tokens):
        (output,) = engine.generate("hello", max_tokens=max_tokens)
        assert (len(output.token_ids), output.finish_reason) == (max_tokens, "length")

    def test_the_longest_text(self, folder):
        engine = make_engine(folder, max_model_len=20)
        assert [(len(o.token_ids), o.finish_reason) for o in engine.generate([ids(15), ids(19)])] == [
            (5, "length"),
            (1, "length"),
        ]

    def test_usage_and_timings(self, folder):
        engine = make_engine(folder)
        for cached in (0, 2 * BLOCK_SIZE):
            (output,) = engine.generate(ids(2 * BLOCK_SIZE + 1), max_tokens=3)
            usage = output.usage
            assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (
                2 * BLOCK_SIZE + 1,
                3,
                cached,
            )
            assert usage.total_tokens == 2 * BLOCK_SIZE + 4
            assert 0 < output.timings.to_first_token < output.timings.total


def word(folder: Path, token: int) -> str:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return next(text for text, i in vocabulary.items() if i == token)
