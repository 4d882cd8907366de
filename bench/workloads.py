"""What the engines are timed on: requests that arrive together, their prompts random token ids."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Workload:
    """Requests that are submitted at once and generate equally many tokens, whatever the model would end.

    prompt:  tokens of the shortest and of the longest prompt
    tokens:  that each request generates; 1 for a workload of prefill alone
    temperature, top_k, top_p:  as in SamplingParams
    """

    name: str
    requests: int
    prompt: tuple[int, int]
    tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """The same prompts each time, of lengths drawn evenly."""
        rng = random.Random(0)
        return [rng.choices(range(vocab_size), k=rng.randint(*self.prompt)) for _ in range(self.requests)]

    @property
    def sampling(self) -> dict[str, Any]:
        """What is not off, by the names that every engine has for it; nothing where the draw is greedy."""
        chosen = {"temperature": (self.temperature, 0.0), "top_k": (self.top_k, 0), "top_p": (self.top_p, 1.0)}
        return {name: value for name, (value, off) in chosen.items() if value != off}

    @property
    def longest(self) -> int:
        """Tokens of the longest text, prompt and output."""
        return self.prompt[1] + self.tokens

    def __str__(self) -> str:
        shortest, longest = self.prompt
        words = f"{shortest}–{longest}" if shortest < longest else str(shortest)
        words += f" / {self.tokens}" if self.tokens > 1 else ""
        return ", ".join([words, *(f"{name.replace('_', '-')} {value:g}" for name, value in self.sampling.items())])


DECODE = (
    Workload("1", 1, (128, 128), 500),
    Workload("1-sampled", 1, (128, 128), 500, temperature=0.7, top_k=50, top_p=0.9),
    Workload("8", 8, (128, 512), 500),
    Workload("35", 35, (128, 512), 500),
    Workload("35-sampled", 35, (128, 512), 500, temperature=0.7, top_k=50, top_p=0.9),
    Workload("128", 128, (128, 512), 500),
    Workload("256", 256, (128, 512), 300),
    Workload("256-long", 256, (100, 1024), 512, temperature=0.6),
)
PREFILL = (
    Workload("prefill-35", 35, (128, 512), 1),
    Workload("prefill-4096", 1, (4096, 4096), 1),
    Workload("prefill-16384", 1, (16384, 16384), 1),
)
WORKLOADS = {workload.name: workload for workload in DECODE + PREFILL}


def named(names: Iterable[str]) -> list[Workload]:
    """The workloads of these names, all of them for none; ValueError for a name that does not exist."""
    chosen = list(names) or list(WORKLOADS)
    if unknown := [name for name in chosen if name not in WORKLOADS]:
        raise ValueError(f"there is no case {unknown[0]!r}; there are: {', '.join(WORKLOADS)}")
    return [WORKLOADS[name] for name in chosen]
