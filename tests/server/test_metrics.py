"""/metrics has vLLM's names, types and labels, and counts what was done."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from .small_server import SmallServer, serving

NAMES = {
    "gauge": ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"],
    "counter": [
        "prompt_tokens",
        "generation_tokens",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
        "request_success",
    ],
    "histogram": [
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_inference_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_params_max_tokens",
        "request_params_n",
        "iteration_tokens_total",
    ],
}
"""What vLLM 0.11 and later call them (vllm/v1/metrics/loggers.py)."""


def families(server: SmallServer) -> dict:
    answer = server.client.get("/metrics")
    found = {family.name: family for family in text_string_to_metric_families(answer.text)}
    return {name: family for name, family in found.items() if not name.endswith("_created")}


def value(server: SmallServer, sample: str, **labels: str) -> float:
    found = [
        each.value
        for family in families(server).values()
        for each in family.samples
        if each.name == f"vllm:{sample}" and labels.items() <= each.labels.items()
    ]
    assert len(found) == 1, (sample, labels, found)
    return found[0]


@pytest.fixture
def fresh(make_engine):
    with serving(make_engine(max_batch_size=8, enable_prefix_caching=False)) as server:
        yield server


def test_names_types_and_labels_before_any_request(fresh):
    found = families(fresh)
    assert found.keys() == {f"vllm:{name}" for names in NAMES.values() for name in names}
    for kind, names in NAMES.items():
        for name in names:
            family = found[f"vllm:{name}"]
            assert family.type == kind and family.documentation
            for sample in family.samples:
                assert sample.labels["engine"] == "0", sample
                assert name == "cache_config_info" or sample.labels["model_name"] == "small"
    reasons = {
        sample.labels["finished_reason"]: sample.value
        for sample in found["vllm:request_success"].samples
        if sample.name.endswith("_total")
    }
    assert reasons == dict.fromkeys(["stop", "length", "abort", "error"], 0)


def test_the_cache_is_described(fresh):
    (sample,) = families(fresh)["vllm:cache_config_info"].samples
    expected = {"engine": "0", "block_size": "16", "num_gpu_blocks": "128", "enable_prefix_caching": "False"}
    assert expected.items() <= sample.labels.items() and sample.value == 1


def test_requests_are_counted_once_each(fresh):
    body = {"prompt": ["hello", "a" * 30], "n": 2, "max_tokens": 7, "ignore_eos": True}
    assert fresh.post("/v1/completions", body).status_code == 200
    assert value(fresh, "request_success_total", finished_reason="length") == 4
    for name, total in {
        "request_prompt_tokens": 2 * (5 + 30),
        "request_generation_tokens": 28,
        "request_params_max_tokens": 28,
        "request_params_n": 8,
        "iteration_tokens_total": 2 * (5 + 30) + 28,
    }.items():
        assert value(fresh, f"{name}_sum") == total, name
    assert value(fresh, "request_prompt_tokens_bucket", le="20.0") == 2
    assert value(fresh, "iteration_tokens_total_count") == 7  # all four in each step
    seconds = {name: value(fresh, f"{name}_seconds_sum") for name in (
        "request_queue_time", "request_prefill_time", "request_decode_time", "request_inference_time",
        "e2e_request_latency", "request_time_per_output_token", "inter_token_latency",
    )}  # fmt: skip
    for name in seconds:
        assert value(fresh, f"{name}_seconds_count") == (24 if name == "inter_token_latency" else 4)
    both = seconds["request_prefill_time"] + seconds["request_decode_time"]
    assert seconds["request_inference_time"] == pytest.approx(both)
    # From its submission, which is before its arrival in the engine, but by less than what comes then.
    total = seconds["e2e_request_latency"]
    assert total / 2 < both + seconds["request_queue_time"] < total
    assert seconds["request_decode_time"] == pytest.approx(6 * seconds["request_time_per_output_token"])


def test_a_limit_beyond_any_text_counts_as_what_the_text_may_have(fresh):
    body = '{"prompt": "hello", "n": 3, "ignore_eos": true, "max_tokens": 1' + 400 * "0" + "}"
    answer = fresh.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert value(fresh, "request_success_total", finished_reason="length") == 3
    assert value(fresh, "request_params_n_count") == 3
    assert value(fresh, "request_params_max_tokens_sum") == 3 * (fresh.engine.max_model_len - 5)


def test_a_request_that_never_ran_has_no_times_of_running(make_engine):
    engine = make_engine(max_batch_size=1)
    with serving(engine) as server:
        server.slow_down(0.01)
        first = server.connect("/generate", {"prompt": "a", "max_tokens": 100, "ignore_eos": True})
        server.wait(lambda: engine.scheduler.running)
        second = server.connect("/generate", {"prompt": "a"})
        server.wait(lambda: engine.scheduler.waiting)
        second.close()
        server.wait(lambda: not engine.scheduler.waiting)  # were the first to end before it, it would run
        first.close()
        server.assert_comes_to_rest()
        assert value(server, "request_success_total", finished_reason="abort") == 2
        assert value(server, "request_queue_time_seconds_count") == 1
        assert value(server, "request_prompt_tokens_count") == 2
