"""What scheduling costs, and how well the cache is used, without a model:   python -m bench.scheduling"""

from __future__ import annotations

import random
import time
from statistics import median

from microvllm.engine.cache_manager import KVCacheManager
from microvllm.engine.policy import make_policy
from microvllm.engine.scheduler import Scheduler
from microvllm.engine.sequence import Sequence
from microvllm.model.sampling_params import SamplingParams


def microseconds_a_step(policy: str, window: int | None, running: int, steps: int = 200) -> float:
    """The median time of schedule and update together while `running` requests decode."""
    rng = random.Random(0)
    scheduler = Scheduler(
        KVCacheManager(running * 8, 256),
        make_policy(policy, window),
        max_batch_size=running,
        max_prefill_tokens=1 << 30,
        age_bound=30.0,
    )
    params = SamplingParams(max_tokens=1000)
    for i in range(running):
        prompt = [rng.randrange(50000) for _ in range(rng.randint(100, 512))]
        scheduler.add(Sequence(i, prompt, params, max_length=len(prompt) + 1000, stop_token_ids=frozenset({50001})))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        batch = scheduler.schedule(0.0)
        middle = time.perf_counter()
        tokens = [7] * len(batch.sampled)
        resumed = time.perf_counter()
        scheduler.update(batch, tokens)
        times.append(middle - start + time.perf_counter() - resumed)
    return median(times[1:]) * 1e6
