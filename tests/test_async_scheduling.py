"""The engine a step behind its device answers as the engine in step with it."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from microvllm import InferenceEngine, SamplingParams
from microvllm.engine.model_runner import Step
from microvllm.engine.outputs import RequestOutput
from microvllm.model.logprobs import Logprobs

from .small_models import VOCAB_SIZE, Shape, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(Shape(), folder)
    return folder


def requests(count: int) -> list[tuple[list[int], SamplingParams]]:
    """Greedy and drawn, with penalties, ends, log-probabilities, some sharing a prefix."""
    rng = random.Random(3)
    drawn = []
    for i in range(count):
        prompt = [7] * rng.choice([0, 20, 40]) + rng.choices(range(VOCAB_SIZE), k=rng.randint(1, 30))
        options = {"max_tokens": rng.randint(4, 30), "seed": i, "temperature": rng.choice([0.0, 0.8])}
        if rng.random() < 0.4:
            options |= {"repetition_penalty": 1.2, "frequency_penalty": 0.5}
        if rng.random() < 0.4:
            options |= {"logprobs": 2, "prompt_logprobs": rng.choice([None, 1])}
        if rng.random() < 0.5:
            options |= {"stop_token_ids": tuple(range(0, VOCAB_SIZE, 9)), "min_tokens": rng.choice([0, 3])}
        drawn.append((prompt, SamplingParams(**options)))
    return drawn


def answers(engine: InferenceEngine, count: int) -> dict[int, RequestOutput]:
    """By the order of arrival, which takes its time; some are aborted and left out."""
    rng, left, outputs, ids = random.Random(5), requests(count), {}, []
    shown: Counter[int] = Counter()
    while left or engine.has_work:
        for _ in range(rng.randint(0, 2)):
            if left:
                ids.append(engine.add_request(*left.pop()))
                if len(ids) % 8 == 0:
                    engine.abort(ids[-2])
        for event in engine.step():
            shown[event.request_id] += event.token_id is not None
            if event.output is not None:
                outputs[event.request_id] = event.output
    engine.cache_manager.check()
    assert engine.cache_manager.num_used == 0
    kept = {i: output for i, output in outputs.items() if output.finish_reason != "abort"}
    for i, output in kept.items():
        assert shown[i] == len(output.token_ids) == output.usage.completion_tokens
    return kept


@pytest.mark.parametrize("num_blocks", [64, 6], ids=["room", "preemption"])
def test_the_outputs_are_equal(folder, num_blocks):
    options = {"max_batch_size": 6, "num_blocks": num_blocks, "block_size": 16, "max_prefill_tokens": 24}
    engines = [
        InferenceEngine(folder, device="cpu", progress=False, async_scheduling=behind, **options)
        for behind in (False, True)
    ]
    expected, got = (answers(engine, 40) for engine in engines)
    assert all(bool(engine.stats().preemptions) == (num_blocks == 6) for engine in engines)
    both = expected.keys() & got.keys()  # an abort may find a request that has ended in one of them
    assert len(both) >= 30
    for i in both:
        assert (got[i].token_ids, got[i].finish_reason) == (expected[i].token_ids, expected[i].finish_reason)
        for name in ("logprobs", "prompt_logprobs"):
            assert numbers(getattr(got[i], name)) == pytest.approx(numbers(getattr(expected[i], name)), abs=1e-4)


@pytest.mark.parametrize("behind", [False, True], ids=["in step", "a step behind"])
def test_an_interrupt_while_the_device_is_waited_for_loses_no_token(folder, monkeypatch, behind):
    """Whichever step it is: in that of another call, which ends by it, the streams that are open go on."""
    engine = InferenceEngine(
        folder, device="cpu", progress=False, async_scheduling=behind, num_blocks=64, block_size=16, max_batch_size=4
    )
    options = {"max_tokens": 12, "temperature": 0.8, "seed": 3, "frequency_penalty": 0.5, "logprobs": 1}
    whole = [token for token, _ in engine.stream_generate([7] * 20, **options)]
    result = Step.result
    for last in range(1, 8):
        calls = itertools.count(1)

        def interrupted(step, calls=calls, last=last):
            if next(calls) == last:
                raise KeyboardInterrupt
            return result(step)

        stream = engine.stream_generate([7] * 20, **options)
        tokens = [next(stream)[0], next(stream)[0]]
        with monkeypatch.context() as patched:
            patched.setattr(Step, "result", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.generate([[5] * 40], max_tokens=20)
        tokens += [token for token, _ in stream]
        assert tokens == whole
        engine.cache_manager.check()
        assert engine.cache_manager.num_used == 0 and not engine.has_work


def numbers(entries: list[Logprobs | None] | None) -> list[float]:
    """All log-probabilities with their tokens, in order."""
    return [x for e in entries or [] if e is not None for x in (e.token_id, e.logprob, *(y for t in e.top for y in t))]
