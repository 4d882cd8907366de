"""Scheduling policies on requests of mixed lengths, more than run at once: throughput, waiting, completion."""

from __future__ import annotations

import gc
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median, quantiles
from typing import Any

import torch
from microvllm import InferenceEngine
from microvllm.engine.outputs import RequestOutput

from .engines import Model, our_engine
from .record import table
from .turns import WARM_UP_TOKENS, spread

POLICIES = (
    ("fcfs", None),
    ("sjf", None),
    ("sjf_aligned", 0),
    ("sjf_aligned", 16),
    ("sjf_aligned", 256),
    ("sjf_aligned", None),
)
"""Name and alignment window; the first is the one whose time sets the pace of arrivals."""


@dataclass(frozen=True)
class Requests:
    """count:  of requests, more than run at once: an order of admission matters only where there is a queue
    prompt, output:  tokens of the shortest and of the longest
    running:  that run at once
    """

    count: int = 256
    prompt: tuple[int, int] = (100, 1024)
    output: tuple[int, int] = (16, 512)
    running: int = 64

    def draw(self, vocab_size: int) -> list[tuple[list[int], int]]:
        """(prompt, tokens to generate) of each; the same each time."""
        rng = random.Random(0)
        return [
            (rng.choices(range(vocab_size), k=rng.randint(*self.prompt)), rng.randint(*self.output))
            for _ in range(self.count)
        ]

    @property
    def longest(self) -> int:
        return self.prompt[1] + self.output[1]


@dataclass(frozen=True)
class Run:
    """seconds: from the first arrival to the last token
    outputs: in the order of their ends
    longest_wait: seconds that a request went without a token, since it arrived or since its last one
    """

    seconds: float
    outputs: list[RequestOutput]
    longest_wait: float


def drive(engine: InferenceEngine, requests: Sequence[tuple[list[int], int]], arrivals: Sequence[float]) -> Run:
    """Runs requests to their ends.   arrivals: seconds after the start of each, in order"""
    coming = deque(zip(arrivals, requests, strict=True))
    outputs: list[RequestOutput] = []
    heard: dict[int, float] = {}  # when each request arrived or got its last token
    longest_wait = now = 0.0
    start = time.perf_counter()
    while len(outputs) < len(requests):
        while coming and coming[0][0] <= now:
            _, (prompt, tokens) = coming.popleft()
            request_id = engine.add_request(prompt, max_tokens=tokens, ignore_eos=True)
            heard[request_id] = time.perf_counter() - start
        events = engine.step()
        now = time.perf_counter() - start
        for event in events:
            longest_wait = max(longest_wait, now - heard[event.request_id])
            heard[event.request_id] = now
            if event.output is not None:
                outputs.append(event.output)
    return Run(now, outputs, longest_wait)


def row(run: Run) -> dict[str, float]:
    """A run in figures; the times of a request count from its arrival."""
    first = [output.timings.to_first_token for output in run.outputs]
    whole = [output.timings.total for output in run.outputs]
    return {
        "tokens/s": sum(len(output.token_ids) for output in run.outputs) / run.seconds,
        "first token s": mean(first),
        "first token 99 % s": _percentile_99(first),
        "completion s": mean(whole),
        "completion 99 % s": _percentile_99(whole),
        "longest wait s": run.longest_wait,
    }


def bench(model: Model, vocab_size: int, requests: Requests, rounds: int) -> list[dict[str, Any]]:
    """A row for each way of arriving and policy, of the medians of its turns: all at once, and evenly over the time
    that all at once took `fcfs` first. In each round every policy has a turn, in an engine of its own.
    """
    drawn = requests.draw(vocab_size)
    arrivals: list[float] = []
    turns: dict[tuple[str, str, int | str], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name, window in POLICIES:
            engine = our_engine(model, max_batch_size=requests.running, policy=name, alignment_window=window)
            engine.generate([prompt for prompt, _ in drawn], max_tokens=WARM_UP_TOKENS, ignore_eos=True)
            at_once = drive(engine, drawn, [0.0] * len(drawn))
            if not arrivals:
                span, rng = at_once.seconds, random.Random(1)
                arrivals = sorted(rng.uniform(0, span) for _ in drawn)
            over_time = drive(engine, drawn, arrivals)
            for way, run in (("at once", at_once), (f"over {span:.3g} s", over_time)):
                key = (way, name, "unlimited" if window is None else window)
                turns.setdefault(key, []).append(row(run))
                print(table([medians(*key, turns[key])]), flush=True)
            del engine  # the next one takes its memory
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return sorted((medians(*key, rows) for key, rows in turns.items()), key=lambda row: row["arrivals"] != "at once")


def medians(way: str, policy: str, window: int | str, rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The row of several turns, with the spread of their tokens/s."""
    found: dict[str, Any] = {"arrivals": way, "policy": policy, "window": window}
    for name in rows[0]:
        found[name] = median(row[name] for row in rows)
        if name == "tokens/s":
            found["tokens/s ±"] = spread([row[name] for row in rows])
    return found


def _percentile_99(values: list[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[-1]
