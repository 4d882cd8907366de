"""Engines taking turns at a workload, A B A B, so that a drift of the machine meets both alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from .engines import Engine
from .workloads import Workload

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Turn:
    """One engine's turn at a workload.

    prefill:  seconds to the first token of all requests
    step:     seconds of each further token; None where there is none
    rate:     tokens/s over the whole: of the output, or of the prompts where prefill is all
    """

    prefill: float
    step: float | None
    rate: float


def measure(engine: Engine, prompts: list[list[int]], tokens: int, sampling: Mapping[str, float]) -> Turn:
    prefill = engine.seconds(prompts, 1, sampling)
    if tokens == 1:
        return Turn(prefill, None, sum(map(len, prompts)) / prefill)
    total = engine.seconds(prompts, tokens, sampling)
    return Turn(prefill, (total - prefill) / (tokens - 1), len(prompts) * tokens / total)


def spread(values: Sequence[float]) -> str:
    """Half the distance of the extremes, of the median."""
    return f"±{(max(values) - min(values)) / 2 / median(values):.1%}"


@dataclass(frozen=True)
class Comparison:
    """The turns of each engine at a workload, by the engine's name.

    floor: seconds that no step takes less than, see `bench.floor`; None where it is not known
    """

    workload: Workload
    turns: Mapping[str, list[Turn]]
    floor: float | None = None

    def median(self, engine: str, what: str) -> float:
        """what: a field of Turn"""
        return median(getattr(turn, what) for turn in self.turns[engine])

    def spread(self, engine: str, what: str) -> str:
        return spread([getattr(turn, what) for turn in self.turns[engine]])

    def gain(self, engine: str, peer: str, what: str) -> float:
        """How many times better the engine's median is: over 1 is faster, for times and rates alike."""
        ratio = self.median(engine, what) / self.median(peer, what)
        return ratio if what == "rate" else 1 / ratio


def compare(
    engines: Mapping[str, Engine], workload: Workload, vocab_size: int, rounds: int, floor: float | None = None
) -> Comparison:
    """Each engine warms up, and then takes `rounds` turns."""
    prompts = workload.prompts(vocab_size)
    for engine in engines.values():
        measure(engine, prompts, min(WARM_UP_TOKENS, workload.tokens), workload.sampling)
    turns: dict[str, list[Turn]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            turns[name].append(measure(engine, prompts, workload.tokens, workload.sampling))
    return Comparison(workload, turns, floor)
