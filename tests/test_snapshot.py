"""The engine at one moment: each block's state is what the cache manager's books say."""

from __future__ import annotations

import pytest
from microvllm import InferenceEngine
from microvllm.engine.snapshot import CACHED, FIRST_OWNER, FREE, SHARED, WAITING_SHOWN, EngineSnapshot

from .small_engine import ids
from .small_models import Shape, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(Shape(), folder)
    return folder


@pytest.fixture
def engine(folder):
    return InferenceEngine(folder, max_batch_size=4, num_blocks=20, block_size=16, device="cpu", progress=False)


def states(snapshot: EngineSnapshot) -> list[int]:
    """How many blocks are free, cached, shared, and each running request's own."""
    kinds = [FREE, CACHED, SHARED, *range(FIRST_OWNER, FIRST_OWNER + len(snapshot.running))]
    found = snapshot.block_states()
    assert len(found) == snapshot.stats.blocks and set(found) <= set(kinds)
    return [found.count(kind) for kind in kinds]


def test_an_idle_engine(engine):
    snapshot = EngineSnapshot.of(engine)
    assert states(snapshot) == [20, 0, 0]
    assert (snapshot.running, snapshot.waiting, snapshot.stats.steps, snapshot.block_size) == ([], [], 0, 16)


def test_what_runs_with_its_own_blocks_and_shared_ones(engine):
    prompt = ids(40)
    engine.generate([prompt], max_tokens=1)
    assert states(EngineSnapshot.of(engine)) == [18, 2, 0]
    engine.add_request(prompt, max_tokens=30, ignore_eos=True)  # the two cached blocks and one of its own
    engine.step()
    assert states(EngineSnapshot.of(engine)) == [17, 0, 0, 3]
    engine.add_request([*prompt[:32], *ids(20, seed=1)], max_tokens=30, ignore_eos=True)
    for _ in range(3):
        engine.step()
    snapshot = EngineSnapshot.of(engine)
    assert states(snapshot) == [15, 0, 2, 1, 2]
    first, second = snapshot.running
    assert (first.id + 1, first.state, second.state) == (second.id, "decode", "decode")
    assert (first.prompt_tokens, first.cached_tokens, first.blocks) == (40, 32, 3)
    assert (second.prompt_tokens, second.cached_tokens, second.blocks) == (52, 32, 4)
    assert (first.generated_tokens, second.generated_tokens) == (4, 3)
    assert snapshot.stats.generated_tokens == 1 + 4 + 3
    tables = [engine.cache_manager.block_table(request.id) for request in snapshot.running]
    found = snapshot.block_states()
    assert [found[block] for block in tables[0]] == [SHARED, SHARED, FIRST_OWNER]
    assert [found[block] for block in tables[1]] == [SHARED, SHARED, FIRST_OWNER + 1, FIRST_OWNER + 1]


def test_it_stays_as_it_was_while_the_engine_goes_on(engine):
    engine.add_request(ids(20), max_tokens=60, ignore_eos=True)
    engine.step()
    snapshot = EngineSnapshot.of(engine)
    before = snapshot.block_states(), list(snapshot.running)
    for _ in range(40):
        engine.step()
    assert (snapshot.block_states(), snapshot.running) == before
    later = EngineSnapshot.of(engine)
    assert later.running[0].generated_tokens == snapshot.running[0].generated_tokens + 40
    assert later.stats.steps == snapshot.stats.steps + 40 and later.clock > snapshot.clock


def test_a_prompt_in_chunks_and_those_that_wait(folder):
    engine = InferenceEngine(
        folder, max_batch_size=1, num_blocks=20, block_size=16, max_prefill_tokens=16, device="cpu", progress=False
    )
    asked = [engine.add_request(ids(40, seed=seed), max_tokens=5) for seed in range(WAITING_SHOWN + 5)]
    engine.step()
    snapshot = EngineSnapshot.of(engine)
    (running,) = snapshot.running
    assert (running.state, running.generated_tokens, running.blocks) == ("prefill", 0, 3)
    assert snapshot.stats.waiting == WAITING_SHOWN + 4 and len(snapshot.waiting) == WAITING_SHOWN
    left = [request for request in asked if request != running.id]
    assert [request.id for request in snapshot.waiting] == left[:WAITING_SHOWN]
    assert {(request.state, request.blocks) for request in snapshot.waiting} == {("waiting", 0)}
