"""Steps as CUDA graphs: the bits of the eager engine, whatever joins, leaves, asks for more or is preempted."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from microvllm import InferenceEngine, KernelSet, SamplingParams
from microvllm.engine.chunk_rows import chunk_tensors
from microvllm.engine.lab.forced import forced_steps
from microvllm.engine.model_graph import PREFILL_CHUNKS, PREFILL_TOKENS
from microvllm.kernels.sampling_draw import draw_kernel
from microvllm.kernels.sampling_summary import summarize_kernel

from ..parity import forced_tokens

SHAPES = Path(__file__).parents[2] / "bench" / "shapes"
HALF_B = SHAPES / "qwen2-0.5b"
VOCAB_SIZE = 151936
OPTIONS = {"load_format": "dummy", "device": "cuda", "progress": False, "max_model_len": 1024, "num_blocks": 200}
OPTIONS |= {"enable_prefix_caching": False}  # a cached prefix is rounded otherwise


def make_engine(model: Path = HALF_B, **options) -> InferenceEngine:
    if "block_size" in options:  # that of flash-attn, which is the default where it is installed, is 256
        options["kernels"] = KernelSet.default("cuda").replace(prefill_attention="triton")
    return InferenceEngine(model, **OPTIONS | {"max_batch_size": 40} | options)


@pytest.fixture(scope="module")
def graphs():
    return make_engine()


@pytest.fixture(scope="module")
def eager():
    return make_engine(enforce_eager=True)


def prompts(count: int, shortest: int = 1, longest: int = 300) -> list[list[int]]:
    rng = random.Random(count)
    return [rng.choices(range(VOCAB_SIZE), k=rng.randint(shortest, longest)) for _ in range(count)]


def asked(i: int, **options) -> SamplingParams:
    """Greedy, temperature, top-k, top-p and min-p in turn."""
    kinds = (
        {},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
        {"temperature": 1, "min_p": 0.1},
    )
    return SamplingParams(seed=i, ignore_eos=True, **kinds[i % len(kinds)], **options)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 40])
def test_graphs_have_the_bits_of_the_eager_engine_at_a_buckets_size(graphs, eager, count):
    """Every request runs from the first decode to the last, so that both compute the same batches."""
    texts = [engine_outputs(engine, prompts_of_a_captured_size(count)) for engine in (graphs, eager)]
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> list[InferenceEngine]:
    """Two layers of Qwen2-7B, whose products are not computed as narrow ones are: with graphs, and eager."""
    folder = tmp_path_factory.mktemp("wide")
    config = json.loads((SHAPES / "qwen2-7b" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    return [make_engine(folder, max_batch_size=128, enforce_eager=eager) for eager in (False, True)]


@pytest.mark.parametrize("count", [1, 8, 40, 128])
def test_so_have_those_of_a_wide_model(wide, count):
    texts = [engine_outputs(engine, prompts_of_a_captured_size(count)) for engine in wide]
    assert texts[0] == texts[1]


def prompts_of_a_captured_size(count: int) -> list[list[int]]:
    """As many tokens together as a prefill graph has, or more prompts than one takes."""
    drawn = prompts(count, 32, 64)
    if count <= PREFILL_CHUNKS:
        room = min(size for size in PREFILL_TOKENS if size >= sum(map(len, drawn)))
        drawn[0] += [5] * (room - sum(map(len, drawn)))
    return drawn


def engine_outputs(engine: InferenceEngine, prompts: list[list[int]]) -> list:
    """Tokens and log-probabilities: of all logits, in the end. The first token's are left out: a captured prefill draws
    it from a row of PREFILL_CHUNKS, which another number of rows rounds otherwise.
    """
    params = [asked(i, max_tokens=40, logprobs=3 if i % 3 == 0 else None) for i in range(len(prompts))]
    outputs = engine.generate(prompts, params)
    return [(output.token_ids, output.logprobs and output.logprobs[1:]) for output in outputs]


def test_a_prefill_behind_a_cached_prefix_has_the_bits_of_the_padded_call():
    """What is replayed is the call with the same padding, whatever the graph was captured with."""
    engine = make_engine(enable_prefix_caching=True, block_size=16)
    (prefix,) = prompts(1, 200, 200)
    engine.generate([prefix], max_tokens=1)
    runner, equal = engine.runner, []

    def compare(chunks, all_tokens):
        size = min(size for size in PREFILL_TOKENS if size >= sum(chunk.length for chunk in chunks))
        hidden = replayed(chunks, all_tokens).clone()
        padded = chunk_tensors(chunks, runner.block_size, runner.device, tokens=size, rows=PREFILL_CHUNKS)
        where = replace(padded[1], max_query_len=size)
        called = runner.model(padded[0], runner.cache, where, last_only=True)
        equal.append((size, hidden.equal(called[: len(chunks)])))
        return hidden

    replayed, runner._compute_chunks = runner._compute_chunks, torch.inference_mode()(compare)
    for tails in ([3], [30, 90], [5, 6, 7, 250]):
        outputs = engine.generate([prefix[: 16 * i] + [i] * n for i, n in enumerate(tails, 8)], max_tokens=2)
        assert all(output.usage.cached_tokens for output in outputs)
    assert equal == [(64, True), (128, True), (384, True)]


def test_padded_rows_change_nothing_but_rounding(graphs, eager):
    """Fed one text, five sequences draw in a bucket of eight what they draw in a batch of five, but for close calls."""
    texts = [random.Random(i).choices(range(VOCAB_SIZE), k=64) for i in range(5)]
    padded, exact = (forced_tokens(engine, prompts(5), texts) for engine in (graphs, eager))
    same = [a == b for step in zip(padded, exact, strict=True) for a, b in zip(*step, strict=True)]
    assert len(same) == 5 * 64 and sum(same) >= 0.95 * len(same)


def test_a_step_behind_draws_what_an_engine_in_step_draws(graphs):
    """With penalties and log-probabilities. All end together, so both compute the same batches."""
    in_step = make_engine(async_scheduling=False)
    params = [
        asked(i, max_tokens=30, repetition_penalty=1.1 if i % 5 == 1 else 1.0, logprobs=2 if i % 4 == 2 else None)
        for i in range(8)
    ]
    behind, expected = (engine.generate(prompts(8), params) for engine in (graphs, in_step))
    for got, wanted in zip(behind, expected, strict=True):
        assert (got.token_ids, got.logprobs) == (wanted.token_ids, wanted.logprobs)


def test_whatever_joins_ends_is_aborted_or_preempted():
    """A random life: every text has its length, every block comes back, and no row shows another's token: what was
    drawn greedily is what an engine in step draws when it is fed these texts, but for close calls.
    """
    engine = make_engine(block_size=16, num_blocks=60, max_batch_size=16)
    rng, left, lengths, outputs, greedy = random.Random(1), prompts(40, 100, 400), {}, {}, []
    while left or engine.has_work:
        for _ in range(rng.randint(0, 2)):
            if left:
                tokens, penalty = rng.randint(1, 200), rng.choice([0.0, 0.0, 0.5])
                options = asked(len(left), max_tokens=tokens, presence_penalty=penalty)
                request = engine.add_request(left.pop(), options)
                lengths[request] = tokens
                if options.temperature == penalty == 0:
                    greedy.append(request)
        if rng.random() < 0.02 and lengths:
            engine.abort(rng.choice(list(lengths)))
        outputs |= {event.request_id: event.output for event in engine.step() if event.output is not None}
    engine.cache_manager.check()
    assert engine.cache_manager.num_used == 0 and engine.stats().preemptions > 0
    assert len(outputs) == 40
    for i, output in outputs.items():
        assert output.finish_reason == "abort" or len(output.token_ids) == lengths[i]

    told = [outputs[i] for i in greedy if outputs[i].token_ids]
    in_step = make_engine(block_size=16, num_blocks=800, enforce_eager=True, async_scheduling=False)
    texts = [output.token_ids for output in told]
    drawn = forced_steps(in_step, [output.prompt for output in told], texts)
    same = [token == texts[k][i] for i, step in enumerate(drawn) for k, token, _ in step]
    assert len(told) >= 3 and len(same) == sum(map(len, texts)) >= 200 and sum(same) >= 0.95 * len(same)


def test_nothing_that_a_request_asks_of_the_draw_is_compiled_while_others_run(monkeypatch):
    kernels, device = (summarize_kernel, draw_kernel), torch.cuda.current_device()
    for kernel in kernels:  # what other tests have compiled is forgotten
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.device_caches.default_factory))
    engine = make_engine()

    def compiled() -> list[int]:
        return [len(kernel.device_caches[device][0]) for kernel in kernels]

    before = compiled()
    assert min(before) >= 2  # for the model's dtype, and for float32
    for count in range(1, 8):
        params = [asked(i + count, max_tokens=4, presence_penalty=0.5 * (i % 2)) for i in range(count)]
        engine.generate(prompts(count), params)
    assert compiled() == before


def test_logits_that_are_no_numbers_end_a_request_and_nothing_else(graphs):
    (prompt,), token = prompts(1), 77
    healthy = graphs.generate([prompt], asked(0, max_tokens=8))[0].token_ids
    embedding = graphs.runner.model.embedding.data
    kept = embedding[token].clone()
    embedding[token] = torch.nan
    (output,) = graphs.generate([prompt], asked(0, max_tokens=8))
    embedding[token] = kept
    assert output.finish_reason == "error"
    assert graphs.generate([prompt], asked(0, max_tokens=8))[0].token_ids == healthy


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_an_engine_on_another_gpu_than_the_current_one_computes_there(enforce_eager):
    texts = []
    for device in ("cuda:0", "cuda:1"):
        engine = make_engine(device=device, enforce_eager=enforce_eager)
        texts.append(engine_outputs(engine, prompts(8)))
        assert engine.runner.device == torch.device(device) and torch.cuda.current_device() == 0
    assert texts[0] == texts[1]
