"""Requests that decode together, step after step, and a clock at each part of the host's work."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

from microvllm import InferenceEngine
from microvllm.engine.config import EngineConfig
from microvllm.engine.model_runner import ModelRunner
from microvllm.engine.scheduler import Batch

from .workloads import Workload

SCHEDULE, LAUNCH, WAIT, UPDATE = "schedule", "prepare and launch", "wait for the device", "update"
OUTPUTS = "text and outputs"
HOST = (SCHEDULE, LAUNCH, WAIT, UPDATE, OUTPUTS)
"""The host's work in a step, in its order; the last is what `InferenceEngine.step` does beside the others."""
SETTLED = 16
"""Steps of the whole batch before any is timed."""


class _TimedStep:
    """A step whose result is waited for on the clock."""

    def __init__(self, step: Any, result: Callable[[], Any]):
        self.step, self.result = step, result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)


class HostClock:
    """`seconds` grows by what each part of an engine's step takes; `before_launch` is called before each launch.

    It wraps methods of this engine's scheduler and runner, and stays: the engine is for a profile alone.
    """

    def __init__(self, engine: InferenceEngine):
        self.seconds = dict.fromkeys(HOST, 0.0)
        self.before_launch: Callable[[], Any] = lambda: None
        self.batch: Batch | None = None
        scheduler, runner = engine.scheduler, engine.runner
        scheduler.schedule = self._timed(SCHEDULE, scheduler.schedule)
        scheduler.advance = self._timed(SCHEDULE, scheduler.advance)
        scheduler.update = self._timed(UPDATE, scheduler.update)
        launch = self._timed(LAUNCH, runner.launch)

        def watched_launch(batch: Batch, previous: _TimedStep | None = None) -> _TimedStep:
            self.batch = batch
            self.before_launch()
            step = launch(batch, previous and previous.step)
            return _TimedStep(step, self._timed(WAIT, step.result))

        runner.launch = watched_launch

    def _timed(self, part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - start
            return result

        return call


class SteadyDecode:
    """The requests of a workload in an engine, prefilled and `SETTLED` steps on, each with `steps` steps to go.

    RuntimeError, here and later, where they do not all decode in every step: a cache too small for all of them, or
    more than run at once.
    """

    def __init__(self, engine: InferenceEngine, clock: HostClock, workload: Workload, vocab_size: int, steps: int):
        self.engine, self.clock, self.workload = engine, clock, workload
        prompts = workload.prompts(vocab_size)
        options = {"max_tokens": tokens_needed(workload, steps), "ignore_eos": True, **workload.sampling}
        self._requests = [engine.add_request(prompt, **options) for prompt in prompts]
        unheard = set(self._requests)
        for _ in range(_most_prefill_steps(workload)):
            unheard -= {event.request_id for event in engine.step()}
            if not unheard:
                break
        self.run(SETTLED)

    def run(self, steps: int) -> list[dict[str, float]]:
        """→ the seconds of each step by part of HOST; they add up to the step."""
        taken = []
        for _ in range(steps):
            self.clock.seconds = dict.fromkeys(HOST, 0.0)
            start = time.perf_counter()
            self.engine.step()
            whole = time.perf_counter() - start
            batch, requests = self.clock.batch, len(self._requests)
            if batch.chunks or len(batch.decodes) != requests:
                raise RuntimeError(
                    f"a step decoded {len(batch.decodes)} of {requests} requests and prefilled {len(batch.chunks)}: "
                    "there is no steady state to profile"
                )
            parts = self.clock.seconds
            taken.append(parts | {OUTPUTS: whole - sum(parts.values())})
        return taken

    def decode_eagerly(self) -> None:
        """Computes the newest known token of each sequence once more, by a runner without a graph; nothing changes by
        it, for what it writes into the cache is there already.
        """
        runner = self.engine.runner
        seqs = [copy.copy(seq) for seq in self.engine.scheduler.running]
        for seq in seqs:
            seq.num_pending = 0
        ModelRunner(runner.model, runner.sampler, runner.cache, len(seqs)).launch(Batch([], seqs, seqs)).result()

    def close(self) -> None:
        for request in self._requests:
            self.engine.abort(request)
        self.engine.step()  # takes the outputs of what was aborted away


def tokens_needed(workload: Workload, steps: int) -> int:
    """Of each request, so that none ends before the last has had its steps."""
    return _most_prefill_steps(workload) + SETTLED + steps + 2


def _most_prefill_steps(workload: Workload) -> int:
    """Until the first token of all is known; one step may only end the last prompt, and the host may be one behind."""
    return -(-workload.requests * workload.prompt[1] // EngineConfig.interleaved_prefill_tokens) + 2
