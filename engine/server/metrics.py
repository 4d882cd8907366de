"""What Prometheus is told, under the names and labels of vLLM, so that its dashboards work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..async_engine import Stream
from ..outputs import RequestOutput, StepOutput
from ..stats import EngineStats

# Seconds, vLLM's own buckets.
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
TOKENS_OF_A_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
COUNT = (1, 2, 5, 10, 20)
REASONS = ("stop", "length", "abort", "error")
REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class Metrics:
    """`record` is a Listener of AsyncEngine.

    cache:  what /metrics tells about the cache, once and for all
    """

    def __init__(self, model_name: str, *, max_model_len: int, cache: Mapping[str, object]):
        self._labels = {"model_name": model_name, "engine": "0"}
        self._registry = CollectorRegistry()
        self._stats: EngineStats | None = None
        self._last_token: dict[int, float] = {}  # when it came, by request id
        self._registry.register(self)
        success = Counter(
            "vllm:request_success", "Requests that ended", [*self._labels, "finished_reason"], registry=self._registry
        )
        self._success = {reason: success.labels(**self._labels, finished_reason=reason) for reason in REASONS}
        seconds, tokens = self._seconds, self._tokens
        self._first = seconds("time_to_first_token", "From submission to the first token", FIRST_TOKEN)
        self._between = seconds("inter_token_latency", "Between two tokens", BETWEEN_TOKENS)
        self._mean_between = seconds("request_time_per_output_token", "Mean of a request's", BETWEEN_TOKENS)
        self._total = seconds("e2e_request_latency", "From submission to the end", REQUEST)
        self._queued = seconds("request_queue_time", "Waiting to be computed", REQUEST)
        self._inference = seconds("request_inference_time", "From the first step to the end", REQUEST)
        self._prefill = seconds("request_prefill_time", "From the first step to the first token", REQUEST)
        self._decode = seconds("request_decode_time", "From the first token to the end", REQUEST)
        lengths = tuple(_one_two_five(max_model_len))
        self._prompt_length = tokens("request_prompt_tokens", "Tokens of a request's prompt", lengths)
        self._answer_length = tokens("request_generation_tokens", "Tokens generated for a request", lengths)
        self._limit = tokens("request_params_max_tokens", "max_tokens of a request", lengths)
        self._choices = tokens("request_params_n", "n of a request", COUNT)
        self._step = tokens("iteration_tokens_total", "Tokens of prompts and answers in a step", TOKENS_OF_A_STEP)
        labels = {"engine": "0"} | {name: str(value) for name, value in cache.items()}
        info = Gauge("vllm:cache_config_info", "The cache", list(labels), registry=self._registry)
        info.labels(**labels).set(1)

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return self._tokens(f"{name}_seconds", f"{text}, in seconds", buckets)

    def _tokens(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", text, list(self._labels), buckets=buckets, registry=self._registry)
        return histogram.labels(**self._labels)

    def record(self, now: float, events: list[tuple[Stream, int, StepOutput]]) -> None:
        computed = 0
        for stream, index, event in events:
            number = event.request_id
            if event.token_id is not None:
                computed += 1
                last = self._last_token.get(number)
                if last is None:
                    self._first.observe(now - stream.submitted)
                    computed += stream.requests[index].seq.num_prompt
                else:
                    self._between.observe(now - last)
                self._last_token[number] = now
            if event.output is not None:
                self._last_token.pop(number, None)
                self._total.observe(now - stream.submitted)
                self._record_end(stream, index, event.output)
        if computed:
            self._step.observe(computed)

    def _record_end(self, stream: Stream, index: int, output: RequestOutput) -> None:
        timings, usage = output.timings, output.usage
        self._success[output.finish_reason].inc()
        self._prompt_length.observe(usage.prompt_tokens)
        self._answer_length.observe(usage.completion_tokens)
        seq = stream.requests[index].seq
        self._limit.observe(seq.max_length - seq.num_prompt)  # max_tokens may be anything beyond it
        self._choices.observe(len(stream.requests) // len(stream.prompts))
        if timings.to_first_step is None:
            return
        self._queued.observe(timings.to_first_step)
        self._inference.observe(timings.total - timings.to_first_step)
        if timings.to_first_token is None:
            return
        decode = timings.total - timings.to_first_token
        self._prefill.observe(timings.to_first_token - timings.to_first_step)
        self._decode.observe(decode)
        if usage.completion_tokens > 1:
            self._mean_between.observe(decode / (usage.completion_tokens - 1))

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
            "generation_tokens": ("Tokens generated", stats.generated_tokens),
            "prefix_cache_queries": ("Tokens looked for in the prefix cache", stats.prompt_tokens),
            "prefix_cache_hits": ("Tokens found in the prefix cache", stats.cached_prompt_tokens),
            "num_preemptions": ("Preemptions", stats.preemptions),
        }
        for family, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in values.items():
                metric = family(f"vllm:{name}", text, labels=list(self._labels))
                metric.add_metric(list(self._labels.values()), value)
                yield metric


def _one_two_five(most: int) -> Iterator[int]:
    """1, 2, 5, 10, 20, 50 … as far as `most`."""
    power = 1
    while power <= most:
        yield from (factor * power for factor in (1, 2, 5) if factor * power <= most)
        power *= 10
