"""What Prometheus is told, under the names and labels of vLLM, so that its dashboards work."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..async_engine import Stream
from ..engine import EngineStats
from ..outputs import StepOutput

# Seconds, vLLM's own buckets.
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class Metrics:
    """`record` is a Listener of AsyncEngine."""

    def __init__(self, model_name: str):
        self._labels = {"model_name": model_name, "engine": "0"}
        self._registry = CollectorRegistry()
        self._stats: EngineStats | None = None
        self._last_token: dict[int, float] = {}  # when it came, by request id
        self._registry.register(self)
        self._generated = self._counter("generation_tokens", "Tokens generated")
        self._success = Counter(
            "vllm:request_success", "Requests that ended", [*self._labels, "finished_reason"], registry=self._registry
        )
        self._first = self._histogram("time_to_first_token_seconds", "From submission to the first token", FIRST_TOKEN)
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens", BETWEEN_TOKENS)
        self._total = self._histogram("e2e_request_latency_seconds", "From submission to the end", REQUEST)
        self._queued = self._histogram("request_queue_time_seconds", "Waiting to be computed", REQUEST)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, list(self._labels), registry=self._registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", text, list(self._labels), buckets=buckets, registry=self._registry)
        return histogram.labels(**self._labels)

    def record(self, now: float, events: list[tuple[Stream, int, StepOutput]]) -> None:
        for stream, _, event in events:
            number = event.request_id
            if event.token_id is not None:
                self._generated.inc()
                last = self._last_token.get(number)
                if last is None:
                    self._first.observe(now - stream.submitted)
                else:
                    self._between.observe(now - last)
                self._last_token[number] = now
            if event.output is not None:
                self._last_token.pop(number, None)
                self._total.observe(now - stream.submitted)
                if event.output.timings.to_first_step is not None:
                    self._queued.observe(event.output.timings.to_first_step)
                self._success.labels(**self._labels, finished_reason=event.output.finish_reason).inc()

    def text(self, stats: EngineStats) -> bytes:
        """All of it, in Prometheus's text format."""
        self._stats = stats
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What the engine counts itself; the registry asks for it."""
        stats = self._stats
        if stats is None:  # while it is registered
            return
        gauges = {
            "num_requests_running": ("Requests that run", stats.running),
            "num_requests_waiting": ("Requests that wait", stats.waiting),
            "kv_cache_usage_perc": ("Share of the cache blocks in use, 1 being all", stats.blocks_used / stats.blocks),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts", stats.prompt_tokens),
            "prefix_cache_queries": ("Tokens looked for in the prefix cache", stats.prompt_tokens),
            "prefix_cache_hits": ("Tokens found in the prefix cache", stats.cached_prompt_tokens),
            "num_preemptions": ("Preemptions", stats.preemptions),
        }
        for family, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in values.items():
                metric = family(f"vllm:{name}", text, labels=list(self._labels))
                metric.add_metric(list(self._labels.values()), value)
                yield metric
