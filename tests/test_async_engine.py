"""The engine behind an event loop: what it answers, refuses, gives up, and how it dies."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from microvllm import InferenceEngine, SamplingParams
from microvllm.engine.async_engine import MOST_EVENTS, AsyncEngine, DeadError, DrainingError, OverloadedError, Stream
from microvllm.engine.snapshot import EngineSnapshot

from .small_engine import assert_at_rest, ids, save_tokenizer
from .small_models import Shape, make_model
from .stalls import Stalls


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(Shape(), folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(params=[False, True], ids=["in step", "a step behind"])
def engine(folder, request):
    options = {"max_batch_size": 4, "num_blocks": 64, "block_size": 16, "device": "cpu", "progress": False}
    return InferenceEngine(folder, async_scheduling=request.param, **options)


def run(engine: InferenceEngine, work, **options):
    """The result of work(AsyncEngine), which must leave the engine at rest unless it died."""

    async def main():
        running = AsyncEngine(engine, **options)
        running.start()
        try:
            return await asyncio.wait_for(work(running), 60)
        finally:
            await running.stop()
            if running.error is None:
                assert running._open == 0 and not running._streams and not running._owners
                assert_at_rest(engine)

    return asyncio.run(main())


async def read(stream: Stream) -> list:
    """→ the outputs in the order of the requests; the pieces must join to their texts."""
    outputs, pieces, tokens = {}, {}, {}
    async for events in stream:
        for index, event in events:
            pieces[index] = pieces.get(index, "") + event.text
            if event.token_id is not None:
                tokens.setdefault(index, []).append(event.token_id)
            if event.output is not None:
                outputs[index] = event.output
    for index, output in outputs.items():
        assert (pieces[index], tokens.get(index, [])) == (output.text, output.token_ids)
    return [outputs[index] for index in sorted(outputs)]


def slow_down(engine: InferenceEngine, seconds: float) -> list[int]:
    """Each step takes so long → a list that grows by one a step."""
    step, steps = engine.step, []

    def slow():
        if engine.has_work:
            steps.append(1)
            time.sleep(seconds)
        return step()

    engine.step = slow
    return steps


def test_many_streams_get_what_generate_gives(engine):
    prompts = ["hello", ids(30), "once upon", ids(7, seed=2), [{"role": "user", "content": "hi"}]]
    params = [SamplingParams(max_tokens=9), SamplingParams(max_tokens=12, temperature=1.0, seed=4)]
    expected = [engine.generate([prompt] * 2, params) for prompt in prompts]

    async def work(running):
        streams = [await running.submit([prompt], params) for prompt in prompts]
        return await asyncio.gather(*map(read, streams)), await read(await running.submit(prompts, params))

    apart, together = run(engine, work)
    assert [[o.token_ids for o in outputs] for outputs in apart] == [[o.token_ids for o in e] for e in expected]
    assert [o.token_ids for o in together] == [o.token_ids for e in expected for o in e]


def test_a_stream_that_nobody_reads_holds_up_no_other(engine):
    async def work(running):
        unread = await running.submit(["hello"], [SamplingParams(max_tokens=90)])
        assert len((await read(await running.submit(["hi"], [SamplingParams(max_tokens=100)])))[0].token_ids) == 100
        return [len(events) async for events in unread]

    assert run(engine, work) == [MOST_EVENTS, 90 - MOST_EVENTS]


def test_the_event_loop_does_not_wait_for_a_step_or_for_a_prompt_to_be_encoded(engine):
    steps = slow_down(engine, 0.4)
    encode = engine.encode

    def slow_encode(prompt):
        time.sleep(0.4)
        return encode(prompt)

    engine.encode = slow_encode

    async def work(running):
        stalls = Stalls()
        watching = asyncio.create_task(stalls.watch())
        await read(await running.submit(["hello"], [SamplingParams(max_tokens=3)]))
        watching.cancel()
        return stalls.longest

    assert run(engine, work) < 0.3 and len(steps) == 3 + engine.config.async_scheduling  # the last one draws nothing


@pytest.mark.parametrize("after", [0, 1, 3])
def test_closing_frees_the_blocks_before_the_next_step(engine, after):
    steps = slow_down(engine, 0.05)

    async def work(running):
        stream = await running.submit([ids(40), ids(50, seed=1)], [SamplingParams(max_tokens=70)] * 3)
        while len(steps) < after:
            await asyncio.sleep(0.005)
        stream.close()
        stream.close()
        at = len(steps)
        while running.engine.has_work or not running._commands.empty():
            await asyncio.sleep(0.005)
        return len(steps) - at

    assert run(engine, work) <= 1


def test_texts_and_their_tokens(engine):
    async def work(running):
        tokens = await running.encode("hello")
        return tokens, await running.decode(tokens)

    assert run(engine, work) == (engine.tokenizer.encode("hello"), "hello")


def test_tokens_are_checked_where_they_are_decoded_and_not_on_the_event_loop(engine):
    threads = set()

    class Tokens(list):
        def __iter__(self):
            threads.add(threading.current_thread().name.split("_")[0])
            return super().__iter__()

    async def work(running):
        tokens = engine.tokenizer.encode("hello")
        assert await running.decode(Tokens(tokens)) == "hello"
        for token in (-1, engine.model_config.vocab_size):
            with pytest.raises(ValueError, match=f"token id {token} must be from 0 to"):
                await running.decode(Tokens([*tokens, token]))
        engine.tokenizer = None
        with pytest.raises(ValueError, match="no tokenizer"):
            await running.decode(tokens)

    run(engine, work)
    assert threads == {"encoder"}


def test_a_prompt_that_cannot_be_served_takes_nothing(engine):
    async def work(running):
        for prompts, message in (([ids(5), ids(500)], "is too long"), (["a", ""], "is empty"), ([[-1]], "token id -1")):
            with pytest.raises(ValueError, match=message):
                await running.submit(prompts, [SamplingParams(max_tokens=3)])
        assert running._open == 0

    run(engine, work)


def test_overload_is_refused_at_once_and_what_was_admitted_finishes(engine):
    slow_down(engine, 0.01)

    async def work(running):
        streams = [await running.submit([ids(5)], [SamplingParams(max_tokens=10)] * 3) for _ in range(2)]
        before = time.monotonic()
        with pytest.raises(OverloadedError, match="6 requests run or wait, and 8 may"):
            await running.submit([ids(5)] * 3, [SamplingParams(max_tokens=10)])
        assert time.monotonic() - before < 0.05
        with pytest.raises(ValueError, match="9 requests at once are too many: at most 8"):
            await running.submit([ids(5)] * 9, [SamplingParams()])
        streams.append(await running.submit([ids(5)] * 2, [SamplingParams(max_tokens=10)]))
        outputs = await asyncio.gather(*map(read, streams))
        await read(await running.submit([ids(5)] * 8, [SamplingParams(max_tokens=1)]))
        return [len(output.token_ids) for group in outputs for output in group]

    assert run(engine, work, max_waiting=4) == [10] * 8


def test_cancelling_a_submission_gives_its_place_back(engine):
    encode, entered, leave = engine.encode, threading.Event(), threading.Event()

    def held(prompt):
        entered.set()
        leave.wait(10)
        return encode(prompt)

    engine.encode = held

    async def work(running):
        task = asyncio.create_task(running.submit(["hello"], [SamplingParams()]))
        await asyncio.to_thread(entered.wait, 10)
        assert running._open == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert running._open == 0
        leave.set()

    run(engine, work)


def test_a_drain_lets_answers_finish_and_admits_none(engine):
    slow_down(engine, 0.01)

    async def work(running):
        stream = await running.submit([ids(5)], [SamplingParams(max_tokens=20)] * 6)
        drain = asyncio.create_task(running.drain(30))
        await asyncio.sleep(0.02)
        with pytest.raises(DrainingError):
            await running.submit([ids(5)], [SamplingParams()])
        outputs = await read(stream)
        await asyncio.wait_for(drain, 1)
        return [len(output.token_ids) for output in outputs]

    assert run(engine, work) == [20] * 6


def test_a_drain_aborts_what_is_not_done_in_time(engine):
    slow_down(engine, 0.02)

    async def work(running):
        stream = await running.submit([ids(5)], [SamplingParams(max_tokens=100)] * 6)
        await running.drain(0.2)
        return await read(stream)

    outputs = run(engine, work)
    assert [output.finish_reason for output in outputs] == ["abort"] * 6
    assert 0 < len(outputs[0].token_ids) < 100


def test_what_comes_to_an_engine_that_has_stopped_fails_and_is_not_left_waiting(engine):
    encode, encoding, stopped = engine.encode, threading.Event(), threading.Event()

    def slow_encode(prompt):
        encoding.set()
        assert stopped.wait(10)
        return encode(prompt)

    engine.encode = slow_encode

    async def work(running):
        under_way = asyncio.create_task(running.submit(["hello"], [SamplingParams(max_tokens=5)]))
        await asyncio.to_thread(encoding.wait, 10)
        await running.stop()
        stopped.set()
        for call in (under_way, running.submit(["hi"], [SamplingParams()]), running.snapshot(), running.decode([1])):
            with pytest.raises(DeadError, match="the engine has stopped"):
                await asyncio.wait_for(call, 10)
        return running.error

    assert run(engine, work) is None  # it has not died


def test_a_step_that_fails_ends_every_stream_and_everything_after_it(engine):
    async def work(running):
        streams = [await running.submit([ids(5)], [SamplingParams(max_tokens=100)]) for _ in range(3)]
        async for _ in streams[0]:
            break
        engine.step = None  # calling it raises TypeError
        for stream in streams:
            with pytest.raises(DeadError, match="the engine has died: TypeError: 'NoneType'"):
                await read(stream)
        await running.death()
        with pytest.raises(DeadError):
            await running.submit([ids(5)], [SamplingParams()])
        await running.drain(5)
        return running.error

    assert isinstance(run(engine, work).__cause__, TypeError)
    assert not any(thread.name == "engine" for thread in threading.enumerate())


def test_a_thread_that_is_told_to_exit_is_as_dead(engine):
    def leave():
        raise SystemExit("from a library")

    async def work(running):
        engine.step = leave
        with pytest.raises(DeadError, match="SystemExit: from a library"):
            await read(await running.submit([ids(5)], [SamplingParams()]))

    run(engine, work)


def test_snapshots_are_taken_between_steps_and_those_who_ask_together_share_one(engine, monkeypatch):
    slow_down(engine, 0.02)
    taken = []

    class Recorded(EngineSnapshot):
        @classmethod
        def of(cls, engine):
            taken.append(threading.current_thread().name)
            return EngineSnapshot.of(engine)

    monkeypatch.setattr("microvllm.engine.async_engine.EngineSnapshot", Recorded)

    async def work(running):
        idle = await running.snapshot()
        stream = await running.submit([ids(20)], [SamplingParams(max_tokens=50, ignore_eos=True)])
        async for _ in stream:
            break
        leaving, *staying = (asyncio.create_task(running.snapshot()) for _ in range(5))
        await asyncio.sleep(0)
        leaving.cancel()
        busy, *others = await asyncio.gather(*staying)
        assert all(other is busy for other in others)
        stream.close()
        after = await running.snapshot()
        await running.drain(10)
        return idle, busy, after

    idle, busy, after = run(engine, work)
    assert taken == ["engine"] * 3
    assert [len(snapshot.running) for snapshot in (idle, busy, after)] == [0, 1, 0]
    # What it has drawn has been counted, and its blocks hold all that was computed: no step was half done.
    assert busy.running[0].generated_tokens == busy.stats.generated_tokens > 0
    assert busy.stats.steps == busy.stats.generated_tokens + engine.config.async_scheduling


def test_a_snapshot_that_a_dead_engine_owes_is_its_death(engine):
    async def work(running):
        entered, asked = threading.Event(), threading.Event()

        def step():
            entered.set()
            asked.wait(10)
            raise RuntimeError("broken")

        engine.step = step
        await running.submit([ids(5)], [SamplingParams(max_tokens=100)])
        await asyncio.to_thread(entered.wait, 10)
        waiting = asyncio.create_task(running.snapshot())
        await asyncio.sleep(0)
        asked.set()
        with pytest.raises(DeadError, match="broken"):
            await asyncio.wait_for(waiting, 5)
        with pytest.raises(DeadError, match="broken"):
            await asyncio.wait_for(running.snapshot(), 5)

    run(engine, work)


def test_the_listener_hears_all_and_the_stats_are_those_of_the_last_step(engine):
    heard = []

    async def work(running):
        (output,) = await read(await running.submit(["hello"], [SamplingParams(max_tokens=5)]))
        assert running.stats.prompt_tokens == 5 and running.stats.running == 0
        return output

    output = run(engine, work, listener=lambda now, events: heard.extend((now, *event) for event in events))
    assert [event.token_id for *_, event in heard] == output.token_ids
    assert [now for now, *_ in heard] == sorted(now for now, *_ in heard)
