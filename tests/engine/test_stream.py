"""Answers as they are made: streams, and the engine step by step."""

from __future__ import annotations

import pytest

from ..small_engine import assert_at_rest, finish, ids, poison
from .engines import make_engine


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

    def test_others_may_step_it_to_its_end(self, engine):
        alone = list(engine.stream_generate("hello", max_tokens=3))
        stream = engine.stream_generate("hello", max_tokens=3)
        first = next(stream)
        engine.generate("b", max_tokens=20)
        assert [first, *stream] == alone
        pairs = [engine.stream_generate(prompt, max_tokens=4) for prompt in ("a", "b")]
        assert len(list(zip(*pairs, strict=False))) == 4 and not list(pairs[1])
        assert_at_rest(engine)

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
