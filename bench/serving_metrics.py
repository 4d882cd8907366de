"""What a load on a server says: latencies and throughput, by the names and definitions of `vllm bench serve`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .client import Answer, Load, Run

LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}
"""What they are called in keys, as in median_ttft_ms, and in words."""
GOODPUT = ("ttft", "tpot", "e2el")
PERCENTILES = (90, 99)


def time_per_output_token(answer: Answer) -> float:
    """Seconds from the first token to the last, for each token but the first; 0 where there is one."""
    if answer.output_tokens < 2:
        return 0.0
    return (answer.tokens[-1] - answer.tokens[0]) / (answer.output_tokens - 1)


def metrics(run: Run, load: Load, goodput: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Of the requests that completed, with the keys of the JSON that `vllm bench serve --save-result` writes.

    goodput:  the ms that a good request takes at most, by names of GOODPUT
    Two keys are ours: cpu_share, of the client, and errors as a count of each reason.
    RuntimeError where no request completed.
    """
    done = [answer for answer in run.answers if answer.error is None]
    errors = Counter(answer.error for answer in run.answers if answer.error is not None)
    if not done:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in errors.most_common(3))
        raise RuntimeError(f"no request of {len(run.answers)} completed: {reasons}")
    tpots = [time_per_output_token(answer) for answer in done]
    seconds = {
        "ttft": [answer.tokens[0] for answer in done],
        "tpot": [tpot for tpot, answer in zip(tpots, done, strict=True) if answer.output_tokens > 1],
        "itl": np.concatenate([np.diff(answer.tokens) for answer in done]),
        "e2el": [answer.tokens[-1] for answer in done],
        "client_queue_time": [answer.queued for answer in done],
    }
    good = None
    if goodput:
        of_each = seconds | {"tpot": tpots}
        good = sum(all(of_each[name][i] * 1e3 <= bound for name, bound in goodput.items()) for i in range(len(done)))
    prompt_tokens = sum(answer.prompt_tokens for answer in done)
    output_tokens = sum(answer.output_tokens for answer in done)
    found = {
        "num_prompts": len(run.answers),
        "request_rate": "inf" if load.request_rate == np.inf else load.request_rate,
        "burstiness": 1.0,
        "max_concurrency": load.max_concurrency,
        "duration": run.duration,
        "completed": len(done),
        "failed": len(run.answers) - len(done),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(done) / run.duration,
        "request_goodput": good if good is None else good / run.duration,
        "output_throughput": output_tokens / run.duration,
        "total_token_throughput": (prompt_tokens + output_tokens) / run.duration,
        "max_output_tokens_per_s": _peak_tokens(done),
        "max_concurrent_requests": _peak_requests(done),
        "errors": dict(errors),
        "cpu_share": run.cpu_share,
    }
    for name, values in seconds.items():
        found |= {f"{what}_{name}_ms": value for what, value in _statistics(np.asarray(values) * 1e3).items()}
    return found


def _statistics(values: np.ndarray) -> dict[str, float]:
    values = values if values.size else np.zeros(1)  # as vLLM's client does
    statistics = {"mean": values.mean(), "median": np.median(values), "std": values.std()}
    statistics |= {f"p{q}": np.percentile(values, q) for q in PERCENTILES}
    return {name: float(value) for name, value in statistics.items()}


def _peak_tokens(answers: Sequence[Answer]) -> float:
    """Tokens of the best whole second, counted from the first request's start."""
    first = min(answer.start for answer in answers)
    times = np.concatenate([np.asarray(answer.tokens) + (answer.start - first) for answer in answers])
    return float(np.bincount(times.astype(int)).max())


def _peak_requests(answers: Sequence[Answer]) -> int:
    """Most requests under way at one time; one that ends when another starts is not under way with it."""
    events = [(answer.start, 1) for answer in answers]
    events += [(answer.start + answer.tokens[-1], -1) for answer in answers]
    return int(np.cumsum([change for _, change in sorted(events)]).max())
