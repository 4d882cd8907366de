"""What scheduling costs, and how well the cache is used, without a model:   python -m bench.scheduling"""

from __future__ import annotations

import argparse
import random
import time
from statistics import mean, median, quantiles

from microvllm.engine.cache_manager import KVCacheManager
from microvllm.engine.policy import make_policy
from microvllm.engine.scheduler import Scheduler
from microvllm.engine.sequence import Sequence
from microvllm.model.sampling_params import SamplingParams

from .record import save, table

VOCAB_SIZE = 50000


def make_scheduler(policy: str, window: int | None, batch: int, blocks: int, block_size: int = 256) -> Scheduler:
    return Scheduler(
        KVCacheManager(blocks, block_size),
        make_policy(policy, window),
        max_batch_size=batch,
        max_prefill_tokens=1 << 20,
        interleaved_prefill_tokens=1 << 20,
        age_bound=30.0,
    )


def microseconds_a_step(policy: str, window: int | None, running: int, steps: int = 600) -> list[float]:
    """Schedule and update together, for each of `steps` steps in which `running` requests decode."""
    rng = random.Random(0)
    scheduler = make_scheduler(policy, window, running, blocks=running * 8)
    for i in range(running):
        prompt = rng.choices(range(VOCAB_SIZE), k=rng.randint(100, 512))
        length = len(prompt) + steps + 1
        scheduler.add(Sequence(i, prompt, SamplingParams(), max_length=length, stop_token_ids=frozenset({VOCAB_SIZE})))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        batch = scheduler.schedule(0.0)
        scheduler.advance(batch)
        scheduled = time.perf_counter()
        tokens = [7] * len(batch.sampled)
        drawn = time.perf_counter()
        scheduler.update(batch, tokens)
        times.append((scheduled - start + time.perf_counter() - drawn) * 1e6)
    return times[1:]  # the first is the prefill


def cache_use(block_size: int, conversations: int, turns: int, system: int) -> tuple[float, float]:
    """Chats that share a system prompt, each turn asked as soon as the one before is answered, 32 at a time.

    system: tokens of the shared system prompt; a question adds 20 to 100 tokens, an answer 50 to 200
    → (fragmentation, mean over the steps; share of prompt tokens from cached blocks)
    """
    rng = random.Random(0)
    scheduler = make_scheduler("sjf_aligned", None, 32, blocks=(1 << 18) // block_size, block_size=block_size)
    shared = rng.choices(range(VOCAB_SIZE), k=system)
    asked = 0

    def ask(history: list[int]) -> Sequence:
        nonlocal asked
        prompt = history + rng.choices(range(VOCAB_SIZE), k=rng.randint(20, 100))
        seq = Sequence(asked, prompt, SamplingParams(), max_length=len(prompt) + rng.randint(50, 200))
        asked += 1
        scheduler.add(seq)
        return seq

    turn = {seq: 1 for seq in (ask(shared) for _ in range(conversations))}
    fragmentation = []
    while scheduler.has_work:
        batch = scheduler.schedule(0.0)
        scheduler.advance(batch)
        fragmentation.append(scheduler.fragmentation)
        scheduler.update(batch, rng.choices(range(VOCAB_SIZE), k=len(batch.sampled)))
        for seq in batch.sampled:
            if seq.finish_reason and turn[seq] < turns:
                turn[ask(seq.token_ids)] = turn[seq] + 1
    return mean(fragmentation), scheduler.num_cached_tokens / scheduler.num_prompt_tokens


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    cost = []
    for policy, window in (
        ("fcfs", None),
        ("sjf", None),
        ("sjf_aligned", None),
        ("sjf_aligned", 0),
        ("sjf_aligned", 64),
    ):
        for running in (64, 256, 1024):
            times = microseconds_a_step(policy, window, running)
            row = {"policy": policy, "window": "unlimited" if window is None else window, "running": running}
            cost.append(row | {"median µs": median(times), "99th percentile µs": quantiles(times, n=100)[-1]})
    print(table(cost))
    print(save("scheduling-cost", cost, workload="prompts of 100 to 512 tokens, decoding; block size 256"))

    use = []
    for turns, system in ((1, 0), (1, 1000), (4, 1000)):
        for block_size in (16, 64, 256):
            fragmentation, cached = cache_use(block_size, 256, turns, system)
            row = {"system prompt": system, "turns": turns, "block size": block_size}
            use.append(row | {"fragmentation": f"{fragmentation:.1%}", "prompt tokens from cache": f"{cached:.1%}"})
    print(table(use))
    print(
        save(
            "cache-use",
            use,
            workload="256 chats, 32 at a time, one shared system prompt; a question adds 20 to 100 tokens, an answer "
            "50 to 200; a cache of 262144 tokens",
        )
    )


if __name__ == "__main__":
    main()
