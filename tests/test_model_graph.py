"""Steps in padded buckets, as graphs replay them; on a CPU a graph is its call, made again into the same tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
from microvllm import InferenceEngine
from microvllm.engine import model_graph
from microvllm.engine.model_graph import ModelGraphRunner, bucket_sizes

from .small_models import Shape, make_model
from .test_async_scheduling import answers


class Recomputed:
    """A CapturedCall without a GPU."""

    pool = None

    def __init__(self, call, pool):
        self._call, self.outputs = call, call()

    def replay(self):
        for output, new in zip(self.outputs, self._call(), strict=True):
            output.copy_(new)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(Shape(), folder)
    return folder


def note(replayed: set, graph: tuple[str, int], replay: Callable[[], None]) -> None:
    replayed.add(graph)
    replay()


def make_engine(folder, **options) -> InferenceEngine:
    return InferenceEngine(folder, device="cpu", progress=False, block_size=16, **options)


@pytest.mark.parametrize("behind", [False, True], ids=["in step", "a step behind"])
@pytest.mark.parametrize("options", [{}, {"num_blocks": 9}, {"alignment_window": 4}], ids=str)
def test_padded_buckets_answer_as_exact_batches(folder, monkeypatch, behind, options):
    options = {"max_batch_size": 11, "num_blocks": 64, "async_scheduling": behind} | options
    expected = answers(make_engine(folder, **options), 24)
    monkeypatch.setattr(model_graph, "CapturedCall", Recomputed)
    engine = make_engine(folder, **options)
    exact = engine.runner
    engine.runner = runner = ModelGraphRunner(exact.model, exact.sampler, exact.cache, options["max_batch_size"])
    replayed: set[tuple[str, int]] = set()
    for kind, graphs in (("decode", runner._decodes), ("prefill", runner._prefills)):
        for size, graph in graphs.items():
            replay = partial(note, replayed, (kind, size), graph.replay)
            monkeypatch.setattr(graph, "replay", replay)
    got = answers(engine, 24)
    assert {kind for kind, _ in replayed} == {"decode", "prefill"} and len(replayed) > 3
    assert got.keys() == expected.keys()
    for i, output in got.items():
        assert (output.token_ids, output.finish_reason) == (expected[i].token_ids, expected[i].finish_reason)


def test_a_decode_is_captured_again(folder, monkeypatch):
    monkeypatch.setattr(model_graph, "CapturedCall", Recomputed)
    exact = make_engine(folder, num_blocks=4).runner
    runner = ModelGraphRunner(exact.model, exact.sampler, exact.cache, 4)
    before = dict(runner._decodes)
    runner.recapture(3)
    assert [size for size, graph in runner._decodes.items() if graph is not before[size]] == [4]


@pytest.mark.parametrize("largest", [1, 2, 3, 8, 9, 32, 35, 100, 256, 300])
def test_every_batch_has_a_bucket_and_the_largest_its_own(largest):
    sizes = bucket_sizes(largest)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == largest
    for count in range(9, largest + 1):
        size = next(size for size in sizes if size >= count)
        assert size - count < (8 if size <= 64 else 16)


@pytest.mark.parametrize(
    "captured, what", [(0, "a decode of 2 sequences"), (2, f"a prefill of {model_graph.PREFILL_TOKENS[-1]} tokens")]
)
def test_what_cannot_be_captured_is_named(folder, monkeypatch, captured, what):
    calls = itertools.count()

    def fail(call, pool):
        if next(calls) < captured:
            return Recomputed(call, pool)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(model_graph, "CapturedCall", fail)
    runner = make_engine(folder, num_blocks=4).runner
    with pytest.raises(ValueError, match=f"^{what} cannot be captured.*enforce_eager=True"):
        ModelGraphRunner(runner.model, runner.sampler, runner.cache, 2)
