"""The engine at one moment, for people who watch it: what runs, what waits, and who has which cache block."""

from __future__ import annotations

import time
from dataclasses import dataclass

from .engine import InferenceEngine
from .sequence import Sequence, Status
from .stats import EngineStats

FREE, CACHED, SHARED, FIRST_OWNER = range(4)
"""States of a block in `EngineSnapshot.block_states`."""

WAITING_SHOWN = 32
"""Requests that wait may be a thousand, and each costs the engine's thread some time."""


@dataclass(frozen=True)
class RequestSnapshot:
    """state: "waiting", "prefill" or "decode";   blocks: those it uses, shared ones included"""

    id: int
    state: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    blocks: int

    @classmethod
    def of(cls, seq: Sequence) -> RequestSnapshot:
        state, blocks = "waiting", 0
        if seq.status is Status.RUNNING:
            state, blocks = "prefill" if seq.num_uncomputed > 1 else "decode", len(seq.block_table)
        cached = min(seq.num_cached or 0, seq.num_prompt)
        return cls(seq.id, state, seq.num_prompt, cached, seq.num_generated, seq.num_preemptions, blocks)


@dataclass(frozen=True)
class EngineSnapshot:
    """Taken between two steps, in time proportional to the blocks that hold something.

    clock:    time.monotonic(), so that two of them make a rate of what `stats` counts
    running:  by arrival
    waiting:  by arrival, the first WAITING_SHOWN of `stats.waiting`
    """

    clock: float
    stats: EngineStats
    block_size: int
    running: list[RequestSnapshot]
    waiting: list[RequestSnapshot]
    _tables: list[list[int]]
    _cached: list[int]

    @classmethod
    def of(cls, engine: InferenceEngine) -> EngineSnapshot:
        """To be called where the engine is stepped. It copies lists; the rest is left to whoever looks at them."""
        scheduler, cache = engine.scheduler, engine.cache_manager
        return cls(
            time.monotonic(),
            engine.stats(),
            cache.block_size,
            [RequestSnapshot.of(seq) for seq in scheduler.running],
            [RequestSnapshot.of(seq) for seq in scheduler.waiting.first(WAITING_SHOWN)],
            [seq.block_table.copy() for seq in scheduler.running],
            cache.evictable_blocks(),
        )

    def block_states(self) -> list[int]:
        """Of each block: FREE; CACHED, kept for texts to come and used by none; SHARED by several requests; or
        FIRST_OWNER + i, used by `running[i]` alone.
        """
        states = [FREE] * self.stats.blocks
        for block in self._cached:
            states[block] = CACHED
        for owner, table in enumerate(self._tables, FIRST_OWNER):
            for block in table:
                states[block] = SHARED if states[block] else owner
        return states
