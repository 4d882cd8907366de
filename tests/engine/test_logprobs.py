"""Log-probabilities of answers and prompts beside transformers' own."""

from __future__ import annotations

import pytest
import torch
from microvllm.engine import model_runner

from ..small_engine import finish, ids
from ..small_models import transformers_logits
from .engines import make_engine


class TestLogprobs:
    def test_they_are_transformers_own(self, reference, engine):
        (output,) = engine.generate(ids(20), max_tokens=6, temperature=1.0, seed=1, logprobs=3, logit_bias={5: 3.0})
        expected = transformers_logits(reference[0], ids(20) + output.token_ids).log_softmax(-1)[19:]
        assert [entry.token_id for entry in output.logprobs] == output.token_ids
        for entry, row in zip(output.logprobs, expected, strict=False):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
            best = row.topk(3)
            assert [token for token, _ in entry.top] == best.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-3)

    def test_none_are_reported_where_none_are_asked_for(self, engine):
        (output,) = engine.generate(ids(3), max_tokens=2)
        assert output.logprobs is None and output.prompt_logprobs is None
        (output,) = engine.generate(ids(3), max_tokens=2, logprobs=0, prompt_logprobs=0)
        assert [entry.top for entry in output.logprobs] == [[], []]
        assert output.prompt_logprobs[0] is None and [entry.top for entry in output.prompt_logprobs[1:]] == [[], []]


class TestPromptLogprobs:
    prompt = tuple(ids(100, seed=3))
    assert len(prompt) > model_runner.PROMPT_LOGPROB_ROWS

    def assert_like_transformers(self, model, output) -> None:
        expected = transformers_logits(model, list(self.prompt)).log_softmax(-1)
        first, *rest = output.prompt_logprobs
        assert first is None and [entry.token_id for entry in rest] == list(self.prompt[1:])
        for entry, row in zip(rest, expected, strict=False):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
            best = row.topk(2)
            assert [token for token, _ in entry.top] == best.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-3)

    @pytest.mark.parametrize("chunk", [1, 7, 16, 256])
    def test_they_are_transformers_own_in_chunks_and_behind_a_cached_prefix(self, reference, folder, chunk):
        engine = make_engine(folder, max_prefill_tokens=chunk)
        (plain,) = engine.generate(list(self.prompt), max_tokens=2)
        for _ in range(2):
            (output,) = engine.generate(list(self.prompt), max_tokens=2, prompt_logprobs=2)
            self.assert_like_transformers(reference[0], output)
            assert output.token_ids == plain.token_ids

    @pytest.mark.parametrize("step", [1, 3, 6, 8])
    def test_a_preemption_loses_and_doubles_none(self, reference, folder, step):
        engine = make_engine(folder, max_prefill_tokens=16)  # seven chunks, then tokens
        request = engine.add_request(list(self.prompt), max_tokens=6, prompt_logprobs=2)

        def preempt(now: int) -> None:
            if now == step:
                engine.scheduler.preempt(engine.scheduler.running[0])

        self.assert_like_transformers(reference[0], finish(engine, preempt)[request])
        assert engine.stats().preemptions == 1

    def test_logits_of_a_long_prompt_never_exist_all_at_once(self, folder):
        engine = make_engine(folder)
        rows, logits = [], engine.runner.model.logits

        def record(hidden: torch.Tensor) -> torch.Tensor:
            rows.append(len(hidden))
            return logits(hidden)

        engine.runner.model.logits = record
        engine.generate(list(self.prompt), max_tokens=1, prompt_logprobs=0)
        assert sorted(rows) == [1, 99 - model_runner.PROMPT_LOGPROB_ROWS, model_runner.PROMPT_LOGPROB_ROWS]
