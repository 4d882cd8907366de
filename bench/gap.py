"""How long running streams stand still when a long prompt arrives."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from microvllm import InferenceEngine


@dataclass(frozen=True)
class Arrival:
    """streams: that run, their prompts of `shortest` to `longest` tokens
    prompt:   tokens of the one that arrives
    settled:  tokens of every stream before anything is timed
    tokens:   of every stream that are timed before the arrival, and of the new one after it
    """

    streams: int = 35
    shortest: int = 128
    longest: int = 512
    prompt: int = 4096
    settled: int = 32
    tokens: int = 128

    @property
    def stream_tokens(self) -> int:
        """Far more than are timed: a stream that ended would be out of the new prompt's way."""
        return self.settled + 8 * self.tokens

    @property
    def longest_text(self) -> int:
        return max(self.longest + self.stream_tokens, self.prompt + 2 * self.tokens)


def stream_gaps(engine: InferenceEngine, arrival: Arrival, vocab_size: int) -> dict[str, float]:
    """The gaps between consecutive tokens of the streams before and after, in ms; the first after it spans the arrival.

    A stream that stands still when the timing ends has a gap up to there. RuntimeError where a stream ends too early.
    """
    rng = random.Random(0)

    def add(length: int, tokens: int) -> int:
        return engine.add_request(rng.choices(range(vocab_size), k=length), max_tokens=tokens, ignore_eos=True)

    lengths = [rng.randint(arrival.shortest, arrival.longest) for _ in range(arrival.streams)]
    streams = {add(length, arrival.stream_tokens) for length in lengths}
    counts = dict.fromkeys(streams, 0)
    heard: dict[int, float] = {}  # when each got its last token

    def step_until(done: Callable[[], bool]) -> list[float]:
        """→ the streams' gaps in seconds"""
        gaps = []
        while not done():
            events = engine.step()
            now = time.perf_counter()
            for event in events:
                request = event.request_id
                if event.output is not None:
                    raise RuntimeError(f"request {request} ended after {counts[request]} tokens")
                if request in streams and request in heard:
                    gaps.append(now - heard[request])
                heard[request] = now
                counts[request] += 1
        return gaps

    def all_streams_have(tokens: int) -> bool:
        return min(counts[stream] for stream in streams) >= tokens

    try:
        step_until(lambda: all_streams_have(arrival.settled))
        before = step_until(lambda: all_streams_have(arrival.settled + arrival.tokens))
        arrived = time.perf_counter()
        new = add(arrival.prompt, 2 * arrival.tokens)
        counts[new] = 0
        during = step_until(lambda: counts[new] > 0)
        first_token = heard[new] - arrived
        after = step_until(lambda: counts[new] >= arrival.tokens)
        standing = [time.perf_counter() - heard[stream] for stream in streams]
    finally:
        for request in list(counts):
            engine.abort(request)
        engine.step()  # takes the outputs of what was aborted away
    return {
        "median gap before ms": median(before) * 1e3,
        "largest before ms": max(before) * 1e3,
        "largest after ms": max(during + after + standing) * 1e3,
        "first token of the prompt ms": first_token * 1e3,
    }


def bench(engine: InferenceEngine, arrival: Arrival, vocab_size: int, rounds: int) -> list[dict[str, float]]:
    """A row for each round, after one that is not shown."""
    stream_gaps(engine, arrival, vocab_size)
    label = {"streams": arrival.streams, "prompt": arrival.prompt}
    return [{"round": i + 1, **label, **stream_gaps(engine, arrival, vocab_size)} for i in range(rounds)]
