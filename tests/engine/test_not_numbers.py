"""Logits that are not numbers: a request fails alone."""

from __future__ import annotations

import pytest

from ..small_engine import assert_at_rest, ids, poison
from .engines import BLOCK_SIZE, make_engine

NOT_NUMBERS = "the model's logits were not numbers (NaN or infinite)"


class TestNotNumbers:
    bad = 7

    def prompts(self) -> list[list[int]]:
        return [[t for t in ids(20, seed=s) if t != self.bad] for s in range(4)]

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("chunk", [5, 256])
    def test_a_request_fails_alone(self, folder, temperature, chunk):
        options = {"max_tokens": 8, "temperature": temperature, "seed": 3, "logit_bias": {self.bad: -100}}
        engine = make_engine(folder, max_prefill_tokens=chunk)
        expected = [output.token_ids for output in engine.generate(self.prompts(), **options)]
        engine = make_engine(folder, max_prefill_tokens=chunk)
        poison(engine, self.bad)
        bad = [*ids(3, seed=8), self.bad, *ids(10, seed=9)]
        first, failed, *rest = engine.generate([self.prompts()[0], bad, *self.prompts()[1:]], **options, logprobs=1)
        assert (failed.finish_reason, failed.error, failed.token_ids) == ("error", NOT_NUMBERS, [])
        assert [output.token_ids for output in (first, *rest)] == expected
        assert all(output.error is None for output in (first, *rest))
        assert_at_rest(engine)

    def test_one_fails_in_the_middle_of_its_answer(self, folder):
        (whole,) = make_engine(folder).generate(ids(5), max_tokens=8)
        engine = make_engine(folder)
        poison(engine, whole.token_ids[3])
        assert whole.token_ids[3] not in ids(5) + whole.token_ids[:3]
        (failed,) = engine.generate(ids(5), max_tokens=8)
        assert (failed.finish_reason, failed.token_ids) == ("error", whole.token_ids[:4])
        assert failed.text == engine.tokenizer.decode(whole.token_ids[:4])

    def test_the_blocks_it_leaves_harm_nobody(self, folder):
        """Blocks full of NaN come into other hands."""
        engine = make_engine(folder, num_blocks=3, enable_prefix_caching=False)
        (expected,) = engine.generate(self.prompts()[0], max_tokens=20, logit_bias={self.bad: -100})
        poison(engine, self.bad)
        (failed,) = engine.generate([self.bad] * 47, max_tokens=1)
        assert failed.finish_reason == "error"
        (output,) = engine.generate(self.prompts()[0], max_tokens=20, logit_bias={self.bad: -100})
        assert output.token_ids == expected.token_ids

    @pytest.mark.parametrize("chunk", [BLOCK_SIZE + 4, 256])
    def test_a_beginning_that_it_shares_with_others_stays_good(self, folder, chunk):
        """Masked attention multiplies NaN by 0, which spoils what stands before it in the same chunk."""
        engine = make_engine(folder, max_prefill_tokens=chunk)
        shared = self.prompts()[0][:BLOCK_SIZE]
        poison(engine, self.bad)
        (failed,) = engine.generate([*shared, 1, self.bad, 2], max_tokens=1)
        assert failed.finish_reason == "error"
        (output,) = engine.generate([*shared, 3, 4], max_tokens=4, logit_bias={self.bad: -100})
        assert output.finish_reason == "length"
