"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from .scheduler import Scheduler


@dataclass(frozen=True)
class EngineStats:
    """The engine at this moment, and what it has done so far.

    fragmentation:         share of the cache blocks in use that holds no token
    steps:                 that were launched
    cached_prompt_share:   share of all prompt tokens that were served from cached blocks
    """

    running: int
    waiting: int
    blocks_used: int
    blocks: int
    fragmentation: float
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    preemptions: int
    steps: int
    cached_prompt_share: float = field(init=False)

    def __post_init__(self):
        share = self.cached_prompt_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
        object.__setattr__(self, "cached_prompt_share", share)

    @classmethod
    def of(cls, scheduler: Scheduler) -> EngineStats:
        return cls(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_used=scheduler.cache.num_used,
            blocks=scheduler.cache.num_blocks,
            fragmentation=scheduler.fragmentation,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_prompt_tokens=scheduler.num_cached_tokens,
            generated_tokens=scheduler.num_generated_tokens,
            preemptions=scheduler.num_preemptions,
            steps=scheduler.num_steps,
        )
