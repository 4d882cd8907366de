"""The engine from prompts to outputs, on a small random model with a tokenizer of its own."""

from __future__ import annotations

import json
import math
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from microvllm import InferenceEngine, KernelSet, SamplingParams
from microvllm.engine import model_runner
from microvllm.kernels.swiglu import swiglu_reference

from .checkpoints import edit_json
from .small_engine import assert_at_rest, finish, ids, poison, save_tokenizer
from .small_models import MAX_LENGTH, VOCAB_SIZE, Shape, make_model, transformers_logits

BLOCK_SIZE = 16
NOT_NUMBERS = "the model's logits were not numbers (NaN or infinite)"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """transformers' model and its folder, without a tokenizer"""
    folder = tmp_path_factory.mktemp("ids")
    return make_model(Shape(), folder), folder


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    """The model with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("text") / "model"
    shutil.copytree(reference[1], folder)
    save_tokenizer(folder)
    return folder


OPTIONS = {"num_blocks": 64, "block_size": BLOCK_SIZE, "device": "cpu", "progress": False}


@pytest.fixture(scope="module", autouse=True, params=[False, True], ids=["in step", "a step behind"])
def async_scheduling(request):
    """Every test here runs with tokens read before the next step is launched, and after."""
    OPTIONS["async_scheduling"] = request.param


def make_engine(folder: Path, **options) -> InferenceEngine:
    return InferenceEngine(folder, **OPTIONS | options)


@pytest.fixture(scope="module")
def shared_engine(folder, async_scheduling):
    return make_engine(folder)


@pytest.fixture
def engine(shared_engine):
    """One for all tests that leave it as they found it."""
    yield shared_engine
    assert_at_rest(shared_engine)


class TestGenerate:
    chat = ({"role": "user", "content": "hi"},)

    def test_a_single_string(self, engine):
        (output,) = engine.generate("hello", max_tokens=5)
        assert (output.prompt, len(output.token_ids), output.finish_reason) == ("hello", 5, "length")
        assert output.text == engine.tokenizer.decode(output.token_ids)

    def test_texts_ids_and_chats_give_what_their_tokens_give_in_order(self, engine):
        chat = [dict(message) for message in self.chat]
        rendered = "[user]hi[assistant]"
        prompts = ["hello", ids(20), chat, "hello", rendered]
        outputs = engine.generate(prompts, max_tokens=6)
        assert [output.prompt for output in outputs] == prompts
        assert outputs[2].token_ids == outputs[4].token_ids
        assert outputs[2].usage.prompt_tokens == len(rendered)
        for prompt, output in zip(["hello", ids(20), rendered], outputs, strict=False):
            as_ids = prompt if isinstance(prompt, list) else engine.tokenizer.encode(prompt)
            assert engine.generate(as_ids, max_tokens=6)[0].token_ids == output.token_ids
        assert len({tuple(output.token_ids) for output in outputs}) == 3

    def test_one_chat_or_one_list_of_ids_is_one_prompt(self, engine):
        assert len(engine.generate(ids(3), max_tokens=1)) == 1
        assert len(engine.generate([{"role": "user", "content": "hi"}], max_tokens=1)) == 1
        assert engine.generate([]) == []

    def test_items_keep_equal_prompts_apart(self, engine):
        params = [SamplingParams(max_tokens=4), SamplingParams(max_tokens=2), SamplingParams(max_tokens=4)]
        outputs = engine.generate(["same", "same", "other"], params)
        assert outputs.items() == [(o.prompt, o.text) for o in outputs]
        assert [prompt for prompt, _ in outputs.items()] == ["same", "same", "other"]
        assert [len(o.token_ids) for o in outputs] == [4, 2, 4]

    def test_many_more_prompts_than_run_at_once_come_back_in_order(self, folder):
        engine = make_engine(folder, max_batch_size=3)
        prompts = [ids(3 + i % 5, seed=i) for i in range(20)]
        lengths = [1 + i % 7 for i in range(20)]
        together = engine.generate(prompts, [SamplingParams(max_tokens=n) for n in lengths])
        assert [o.prompt for o in together] == prompts
        for prompt, length, output in zip(prompts, lengths, together, strict=True):
            assert output.token_ids == engine.generate(prompt, max_tokens=length)[0].token_ids
        assert_at_rest(engine)

    @pytest.mark.parametrize("streams", [False, True])
    def test_answers_wait_for_all_prompts_unless_somebody_reads_along(self, folder, monkeypatch, streams):
        engine, batches = make_engine(folder, max_prefill_tokens=16, interleaved_prefill_tokens=16), []
        schedule = engine.scheduler.schedule
        monkeypatch.setattr(engine.scheduler, "schedule", lambda now: batches.append(schedule(now)) or batches[-1])
        if streams:
            engine.add_request(ids(5), max_tokens=20)
            engine.step()
        engine.generate([ids(12), ids(13), ids(14)], max_tokens=4)
        assert any(batch.chunks and batch.decodes for batch in batches) == streams


class TestStream:
    def test_pieces_are_what_generate_gives(self, engine):
        for prompt in ("hello", "once upon a time"):
            (whole,) = engine.generate(prompt, max_tokens=20)
            pairs = list(engine.stream_generate(prompt, max_tokens=20))
            assert [token for token, _ in pairs] == whole.token_ids
            assert "".join(piece for _, piece in pairs) == whole.text

    def test_the_output_is_its_return_value(self, engine):
        stream = engine.stream_generate("hello", max_tokens=2)
        next(stream), next(stream)
        with pytest.raises(StopIteration) as end:
            next(stream)
        assert end.value.value.text == engine.generate("hello", max_tokens=2)[0].text

    def test_a_bad_prompt_is_refused_before_the_first_piece(self, engine):
        with pytest.raises(ValueError, match="is empty"):
            engine.stream_generate("")

    def test_closing_it_ends_the_request_and_frees_its_blocks(self, engine):
        stream = engine.stream_generate("hello", max_tokens=50)
        next(stream), next(stream)
        assert engine.stats().blocks_used == 1 and engine.has_work
        stream.close()
        assert_at_rest(engine)

    def test_two_streams_by_turns(self, engine):
        alone = [list(engine.stream_generate(prompt, max_tokens=9)) for prompt in ("one", "two")]
        streams = [engine.stream_generate(prompt, max_tokens=9) for prompt in ("one", "two")]
        turns = list(zip(*streams, strict=True))
        assert [list(pairs) for pairs in zip(*turns, strict=True)] == alone

    def test_a_failing_request_raises(self, folder):
        engine = make_engine(folder)
        poison(engine, 7)
        with pytest.raises(RuntimeError, match="not numbers"):
            next(engine.stream_generate([7]))
        assert_at_rest(engine)


class TestStepByStep:
    def test_generate_in_between_loses_no_event(self, engine):
        expected = engine.generate(ids(20), max_tokens=12)[0].token_ids
        other = engine.generate(ids(30, seed=1), max_tokens=30)[0].token_ids
        request = engine.add_request(ids(20), max_tokens=12)
        events = engine.step()
        assert engine.generate(ids(30, seed=1), max_tokens=30)[0].token_ids == other
        events += engine.step()  # it ended meanwhile
        assert {event.request_id for event in events} == {request}
        assert [event.token_id for event in events] == expected
        assert [event.output is None for event in events] == [True] * 11 + [False]
        assert events[-1].output.token_ids == expected
        assert engine.step() == []

    def test_aborting_tells_what_there_was(self, engine):
        kept, gone = (engine.add_request(ids(5, seed=s), max_tokens=8) for s in (0, 1))
        (whole,) = engine.generate(ids(5, seed=1), max_tokens=2)
        assert engine.abort(gone)
        assert not engine.abort(gone) and not engine.abort(10**9)
        outputs = finish(engine)
        assert outputs[gone].finish_reason == "abort" and outputs[gone].error is None
        assert outputs[gone].token_ids[:2] == whole.token_ids and len(outputs[gone].token_ids) < 8
        assert outputs[kept].token_ids == engine.generate(ids(5), max_tokens=8)[0].token_ids

    def test_log_probabilities_come_with_their_tokens(self, engine):
        request = engine.add_request(ids(20), max_tokens=5, logprobs=2)
        events = []
        while engine.has_work:
            events += engine.step()
        assert {event.request_id for event in events} == {request}
        assert [event.logprobs for event in events] == events[-1].output.logprobs
        assert [event.logprobs.token_id for event in events] == [event.token_id for event in events]

    def test_what_is_prepared_begins_when_it_is_added(self, engine):
        request = engine.prepare("hello", max_tokens=3)
        assert not engine.has_work
        number = engine.add(request)
        assert finish(engine)[number].token_ids == engine.generate("hello", max_tokens=3)[0].token_ids

    def test_a_request_that_waits_knows_for_how_long(self, folder):
        engine = make_engine(folder, max_batch_size=1)
        first, second = engine.generate([ids(5), ids(6)], max_tokens=8)
        assert first.timings.to_first_step < first.timings.to_first_token <= second.timings.to_first_step
        assert second.timings.to_first_step < second.timings.to_first_token < second.timings.total

    def test_aborting_what_waits(self, engine):
        request = engine.add_request(ids(5))
        assert engine.stats().waiting == 1
        assert engine.abort(request)
        (event,) = engine.step()
        assert (event.token_id, event.output.finish_reason, event.output.token_ids) == (None, "abort", [])
        assert (
            event.output.timings.to_first_step is event.output.timings.to_first_token is None
            and event.output.usage.total_tokens == 5
        )


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


class TestSeeds:
    mine = SamplingParams(max_tokens=16, temperature=1.0, top_p=0.95, seed=5)
    others = tuple(
        SamplingParams(max_tokens=20, temperature=t, seed=s, top_k=k)
        for s, (t, k) in enumerate(product((0.0, 0.7, 2.0), (0, 5)))
    )

    def test_tokens_depend_on_the_seed_and_the_text_alone(self, folder):
        prompt = ids(20)
        alone = make_engine(folder).generate(prompt, self.mine)[0].token_ids
        assert len(set(alone)) > 8
        batch = [ids(4 + 3 * i, seed=i) for i in range(7)]
        for place in (0, 4, 7):
            engine = make_engine(folder)
            params = [*self.others, self.mine]
            outputs = engine.generate(
                [*batch[:place], prompt, *batch[place:]], [*params[:place], self.mine, *params[place:]]
            )
            assert outputs[place].token_ids == alone
        assert make_engine(folder, max_prefill_tokens=7).generate(prompt, self.mine)[0].token_ids == alone
        for step in (1, 2, 6, 15):
            engine = make_engine(folder)
            request = engine.add_request(prompt, self.mine)

            def preempt(now: int, engine=engine, step=step) -> None:
                if now == step:
                    engine.scheduler.preempt(engine.scheduler.running[0])

            assert finish(engine, preempt)[request].token_ids == alone
            assert engine.stats().preemptions == 1

    def test_without_a_seed_each_request_draws_its_own_and_the_engines_seed_repeats_them(self, folder):
        def texts(seed: int) -> list[list[int]]:
            outputs = make_engine(folder, seed=seed).generate([ids(5)] * 3, max_tokens=8, temperature=1.0)
            return [output.token_ids for output in outputs]

        first = texts(0)
        assert len(set(map(tuple, first))) == 3
        assert texts(0) == first != texts(1)


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


class TestBadInput:
    @pytest.mark.parametrize(
        "prompt, options, message",
        [
            ("", {}, "prompt '' is empty: it has no tokens"),
            ([], {}, r"prompt \[\] is empty"),
            (
                [1] * MAX_LENGTH,
                {},
                f"a prompt of {MAX_LENGTH} tokens is too long: .* at most max_model_len={MAX_LENGTH}",
            ),
            ([1, VOCAB_SIZE], {}, f"token id {VOCAB_SIZE} of the prompt must be an integer from 0 to {VOCAB_SIZE - 1}"),
            ([1, -1], {}, "token id -1 of the prompt"),
            ([1, "a"], {}, "token id 'a' of the prompt"),
            (3.5, {}, "a prompt is a text, a list of token ids or a chat, not 3.5"),
            (None, {}, "a prompt is a text, a list of token ids or a chat, not None"),
            ("a", {"max_tokens": 0}, "max_tokens=0 must be an integer of at least 1"),
            ("a", {"temperature": -1}, "temperature=-1 must be a number at least 0"),
            ("a", {"temprature": 1}, "unknown option temprature=1; the options are max_tokens, "),
            ("a", {"stop_token_ids": [VOCAB_SIZE]}, f"token id {VOCAB_SIZE} of stop_token_ids"),
            ("a", {"logit_bias": {VOCAB_SIZE: 1.0}}, f"token id {VOCAB_SIZE} of logit_bias"),
            ("a", {"params": SamplingParams(), "max_tokens": 3}, "params or options, not both: max_tokens"),
            ("a", {"params": {"max_tokens": 3}}, r"params must be SamplingParams, not \{'max_tokens': 3\}"),
            ([{"role": "user"}], {}, "a message must have a role and a content"),
        ],
    )
    def test_it_is_refused_by_value_and_limit_and_a_running_request_goes_on(self, folder, prompt, options, message):
        engine = make_engine(folder)
        (undisturbed,) = engine.generate(ids(20), max_tokens=10)
        request = engine.add_request(ids(20), max_tokens=10)
        engine.step(), engine.step()
        before = engine.stats()
        for call in (engine.add_request, engine.stream_generate, lambda p, **o: engine.generate(["fine", p], **o)):
            with pytest.raises(ValueError, match=message):
                call(prompt, **options)
        assert engine.stats() == before
        assert finish(engine)[request].token_ids == undisturbed.token_ids
        assert_at_rest(engine)

    def test_more_than_the_cache_can_ever_hold_is_refused_and_what_just_fits_is_served(self, folder):
        engine = make_engine(folder, num_blocks=3)
        with pytest.raises(
            ValueError, match=r"a prompt of 30 tokens and 20 more need 4 blocks of 16 .* the cache has 3"
        ):
            engine.generate([ids(3), ids(30)], max_tokens=20)
        assert_at_rest(engine)
        # The last token is returned and needs no place.
        assert len(engine.generate(ids(30), max_tokens=19)[0].token_ids) == 19

    def test_the_number_of_params(self, engine):
        with pytest.raises(ValueError, match="2 prompts need as many params, or one for all; there are 3"):
            engine.generate(["a", "b"], [SamplingParams()] * 3)

    @pytest.mark.parametrize("prompts", [None, 5, {"a": 1}])
    def test_prompts_that_are_none(self, engine, prompts):
        with pytest.raises(ValueError, match="prompts must be"):
            engine.generate(prompts)

    @pytest.mark.parametrize(
        "prompt, options, message",
        [
            ("a text", {}, "this checkpoint has no tokenizer: give the prompt as token ids"),
            ([{"role": "user", "content": "a"}], {}, "this checkpoint has no tokenizer"),
            ([1], {"stop": "x"}, r"stop=\('x',\) needs a tokenizer, and this checkpoint has none"),
        ],
    )
    def test_text_without_a_tokenizer(self, reference, prompt, options, message):
        engine = make_engine(reference[1])
        with pytest.raises(ValueError, match=message):
            engine.add_request(prompt, **options)
        (output,) = engine.generate(ids(3), max_tokens=2)
        assert (len(output.token_ids), output.text) == (2, "")

    def test_a_chat_without_a_template(self, folder, tmp_path):
        copy = shutil.copytree(folder, tmp_path / "model")
        (copy / "chat_template.jinja").unlink()
        with pytest.raises(ValueError, match="the model has no chat template"):
            make_engine(copy).generate([{"role": "user", "content": "a"}])

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"max_batchsize": 3}, "unknown option max_batchsize=3; the options are max_batch_size, max_model_len"),
            ({"max_batch_size": 0}, "max_batch_size=0 must be an integer of at least 1"),
            ({"block_size": 8}, "block_size=8 must be an integer from 16 to 256"),
            ({"block_size": 257}, "block_size=257 must be an integer from 16 to 256"),
            ({"num_blocks": 0}, "num_blocks=0 must be an integer of at least 1"),
            (
                {"max_model_len": MAX_LENGTH + 1},
                f"max_model_len={MAX_LENGTH + 1} must be at most the model's {MAX_LENGTH}",
            ),
            ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization=1.1 must be over 0 and at most 1"),
            ({"age_bound": -1}, "age_bound=-1 must be at least 0"),
            ({"age_bound": math.nan}, "age_bound=nan must be at least 0"),
            ({"policy": "lifo"}, "policy='lifo' is not known; the policies are fcfs, sjf, sjf_aligned"),
            ({"dtype": "int8"}, "dtype='int8' must be one of auto, float32, float16, bfloat16"),
            ({"load_format": "pickle"}, "load_format='pickle' must be one of auto, dummy"),
            ({"device": "tpu"}, "device='tpu' must be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ],
    )
    def test_the_engines_own_options(self, folder, options, message):
        with pytest.raises(ValueError, match=message):
            make_engine(folder, **options)


class TestStats:
    def test_fragmentation_and_the_share_of_cached_tokens(self, folder):
        engine = make_engine(folder, async_scheduling=False)  # the figures are those of a moment
        first = engine.add_request(ids(33), max_tokens=20)
        engine.step()
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.blocks, stats.blocks_used) == (1, 0, 64, 3)
        assert stats.fragmentation == 14 / 48  # 33 tokens and the one just drawn, in three blocks of 16
        assert (stats.prompt_tokens, stats.cached_prompt_tokens, stats.cached_prompt_share) == (33, 0, 0.0)

        engine.add_request([*ids(33)[:32], 1, 2], max_tokens=20)
        engine.step()
        stats = engine.stats()
        assert stats.blocks_used == 4  # two are shared
        assert stats.fragmentation == (13 + 13) / 64  # 35 tokens each
        assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (67, 32)
        assert stats.cached_prompt_share == 32 / 67
        engine.abort(first)
        assert engine.stats().blocks_used == 3
        finish(engine)
        assert_at_rest(engine)

    def test_without_a_prefix_cache_nothing_is_shared(self, folder):
        engine = make_engine(folder, enable_prefix_caching=False)
        for _ in range(2):
            engine.generate(ids(33), max_tokens=1)
        assert (engine.stats().prompt_tokens, engine.stats().cached_prompt_share) == (66, 0.0)


def test_a_shape_without_weights_generates(reference, tmp_path):
    shutil.copy(reference[1] / "config.json", tmp_path)
    first, again = (make_engine(tmp_path, load_format="dummy").generate(ids(5), max_tokens=4)[0] for _ in range(2))
    assert len(first.token_ids) == 4 and first.token_ids == again.token_ids
    with pytest.raises(ValueError, match="safetensors"):
        make_engine(tmp_path)


@pytest.mark.parametrize("kernels", [KernelSet.default("cpu"), KernelSet.reference()], ids=["composed", "fused"])
def test_a_swapped_kernel_is_what_runs(folder, kernels):
    calls = []

    def counting(gate_up: torch.Tensor) -> torch.Tensor:
        calls.append(len(gate_up))
        return swiglu_reference(gate_up)

    engine = make_engine(folder, kernels=kernels.replace(swiglu=counting))
    (output,) = engine.generate(ids(5), max_tokens=3)
    assert output.token_ids == make_engine(folder).generate(ids(5), max_tokens=3)[0].token_ids
    assert calls == [5, 1, 1, 1, 1, 1]  # two layers: a prompt, of which the last wants one token, and two tokens
    silent = make_engine(folder, kernels=kernels.replace(swiglu=lambda g: 0 * swiglu_reference(g)))
    assert silent.generate(ids(5), max_tokens=3)[0].token_ids != output.token_ids


def test_bfloat16_on_a_cpu(reference, folder):
    engine = make_engine(folder, dtype="bfloat16")
    assert engine.runner.model.embedding.dtype == engine.runner.cache[0][0].dtype == torch.bfloat16
    (output,) = engine.generate(ids(20), max_tokens=8, logprobs=0)
    expected = transformers_logits(reference[0], ids(20) + output.token_ids)[19:-1].log_softmax(-1)
    likeliest = expected.max(-1).values
    chosen = expected.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
    assert (likeliest - chosen).median() < 0.5  # at bfloat16's precision among the best of 2048


def test_the_start_up_lines_say_what_runs_where(folder, capsys):
    make_engine(folder, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert any(
        line.startswith("model: ") and "float32 weights on cpu, 64 cache blocks of 16 tokens" in line for line in lines
    )
    assert f"kernels: {KernelSet.default('cpu')}" in lines
    make_engine(folder)
    assert capsys.readouterr().err == ""
