"""The time of a call inside a CUDA graph, which holds many calls one behind the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

import torch

REPLAYS, ROUNDS = 50, 5
SECONDS = 0.06
"""For the replays of one graph; slow ones get fewer, but two a round."""


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the median over the replays, and their 10th and 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        deciles = quantiles(times, n=10, method="inclusive")
        return cls(median(times), deciles[0], deciles[-1])


def graph_time(calls: Sequence[Callable[[], Any]], *, replays: int = REPLAYS) -> Timing:
    """The time of one of `calls`, which a CUDA graph holds one behind the other; ValueError without a GPU.

    Let each call read and write memory of its own, together several times the L2.
    """
    gpu(None)
    return take_turns([CapturedCalls(calls)], replays)[0]


def take_turns(
    graphs: Sequence[CapturedCalls], replays: int = REPLAYS, after_round: Callable[[], None] = lambda: None
) -> list[Timing]:
    """The graphs' times, from replays in turns A B C A B C: `replays` of each, fewer of those that take long."""
    shares = [graph.replay(1)[0] * len(graph.calls) * 1e-6 for graph in graphs]
    counts = [max(2, min(replays, int(SECONDS / seconds)) // ROUNDS) for seconds in shares]
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(ROUNDS):
        for graph, count, taken in zip(graphs, counts, times, strict=True):
            taken += graph.replay(count)
        after_round()
    return [Timing.of(taken) for taken in times]


class Clock:
    """The clock of a GPU's multiprocessors, read now and again: a GPU that is hot or out of power runs slower."""

    def __init__(self, device: torch.device):
        self._device, self._megahertz = device, []

    def read(self) -> None:
        """Over the driver's last sample period. Whatever keeps it from being read costs no measurement: the package
        nvidia-ml-py is missing, or the driver's library fails, whose errors that package defines.
        """
        with suppress(Exception):
            self._megahertz.append(torch.cuda.clock_rate(self._device))

    @property
    def range(self) -> tuple[int, int] | None:
        """MHz, the lowest and the highest that were read; None where none was."""
        return (min(self._megahertz), max(self._megahertz)) if self._megahertz else None


class CapturedCalls:
    """A CUDA graph of calls, one behind the other. It keeps what each returned, so that no two write to one place."""

    def __init__(self, calls: Sequence[Callable[[], Any]]):
        self.calls = calls
        self.graph = torch.cuda.CUDAGraph()
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        # The outer block gives the stream back even where a capture that fails does not.
        with torch.cuda.stream(stream):
            for call in calls:  # compiles what is to be compiled, and makes what a library makes once for a stream
                call()
            stream.synchronize()
            _make_room(stream.device)
            # Not torch.cuda.graph, which collects garbage and empties the allocator's cache: that takes the longest.
            self.graph.capture_begin()
            try:
                self.outputs = [call() for call in calls]
            finally:
                self.graph.capture_end()

    def replay(self, times: int = 1) -> list[float]:
        """Microseconds a call in each of so many replays; one goes before them untimed: they then wait for no host."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        self.graph.replay()
        events[0].record()
        for event in events[1:]:
            self.graph.replay()
            event.record()
        events[-1].synchronize()
        return [start.elapsed_time(end) * 1e3 / len(self.calls) for start, end in pairwise(events)]


def gpu(device: str | torch.device | None) -> torch.device:
    """The GPU, with its number; default the current one. ValueError for a device that is none."""
    device = torch.device(device or "cuda")
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError("timing needs a GPU")
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def _make_room(device: torch.device) -> None:
    """Frees what the allocator keeps of earlier graphs, if that is much: during a capture it could not."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if kept > torch.cuda.get_device_properties(device).total_memory // 8:
        torch.cuda.empty_cache()


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The stream of all captures. One is enough, and libraries hold memory for every stream they have seen."""
    return torch.cuda.Stream(device)
