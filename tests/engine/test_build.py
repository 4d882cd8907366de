"""What an engine is built of and says of itself: weights, kernels, dtype, statistics."""

from __future__ import annotations

import shutil

import pytest
import torch
from microvllm import KernelSet
from microvllm.kernels.linear import onednn_has_bfloat16
from microvllm.kernels.swiglu import swiglu_reference

from ..small_engine import assert_at_rest, finish, ids
from ..small_models import transformers_logits
from .engines import make_engine


class TestStats:
    def test_fragmentation_and_the_share_of_cached_tokens(self, folder):
        engine = make_engine(folder, async_scheduling=False)  # the figures are those of a moment
        first = engine.add_request(ids(33), max_tokens=20)
        engine.step()
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.blocks, stats.blocks_used) == (1, 0, 64, 3)
        assert stats.fragmentation == 14 / 48  # 33 tokens and the one just drawn, in three blocks of 16
        assert (stats.prompt_tokens, stats.cached_prompt_tokens, stats.cached_prompt_share) == (33, 0, 0.0)

        engine.add_request([*ids(33)[:32], 1, 2], max_tokens=20)
        engine.step()
        stats = engine.stats()
        assert stats.blocks_used == 4  # two are shared
        assert stats.fragmentation == (13 + 13) / 64  # 35 tokens each
        assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (67, 32)
        assert stats.cached_prompt_share == 32 / 67
        engine.abort(first)
        assert engine.stats().blocks_used == 3
        finish(engine)
        assert_at_rest(engine)

    def test_without_a_prefix_cache_nothing_is_shared(self, folder):
        engine = make_engine(folder, enable_prefix_caching=False)
        for _ in range(2):
            engine.generate(ids(33), max_tokens=1)
        assert (engine.stats().prompt_tokens, engine.stats().cached_prompt_share) == (66, 0.0)


def test_a_shape_without_weights_generates(reference, tmp_path):
    shutil.copy(reference[1] / "config.json", tmp_path)
    first, again = (make_engine(tmp_path, load_format="dummy").generate(ids(5), max_tokens=4)[0] for _ in range(2))
    assert len(first.token_ids) == 4 and first.token_ids == again.token_ids
    with pytest.raises(ValueError, match="safetensors"):
        make_engine(tmp_path)


@pytest.mark.parametrize("kernels", [KernelSet.default("cpu"), KernelSet.reference()], ids=["composed", "fused"])
def test_a_swapped_kernel_is_what_runs(folder, kernels):
    calls = []

    def counting(gate_up: torch.Tensor) -> torch.Tensor:
        calls.append(len(gate_up))
        return swiglu_reference(gate_up)

    engine = make_engine(folder, kernels=kernels.replace(swiglu=counting))
    (output,) = engine.generate(ids(5), max_tokens=3)
    assert output.token_ids == make_engine(folder).generate(ids(5), max_tokens=3)[0].token_ids
    assert calls == [5, 1, 1, 1, 1, 1]  # two layers: a prompt, of which the last wants one token, and two tokens
    silent = make_engine(folder, kernels=kernels.replace(swiglu=lambda g: 0 * swiglu_reference(g)))
    assert silent.generate(ids(5), max_tokens=3)[0].token_ids != output.token_ids


@pytest.mark.parametrize("linear", ["onednn", "reference"])
def test_bfloat16_on_a_cpu(reference, folder, linear):
    kernels = KernelSet.default("cpu").replace(linear=linear)
    if linear == "onednn" and not onednn_has_bfloat16():
        with pytest.raises(ValueError, match="choose float32"):
            make_engine(folder, dtype="bfloat16", kernels=kernels)
        return
    engine = make_engine(folder, dtype="bfloat16", kernels=kernels)
    assert engine.runner.model.embedding.dtype == engine.runner.cache[0][0].dtype == torch.bfloat16
    (output,) = engine.generate(ids(20), max_tokens=8, logprobs=0)
    expected = transformers_logits(reference[0], ids(20) + output.token_ids)[19:-1].log_softmax(-1)
    likeliest = expected.max(-1).values
    chosen = expected.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
    assert (likeliest - chosen).median() < 0.5  # at bfloat16's precision among the best of 2048


def test_the_start_up_lines_say_what_runs_where(folder, capsys):
    make_engine(folder, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert any(
        line.startswith("model: ") and "float32 weights on cpu, 64 cache blocks of 16 tokens" in line for line in lines
    )
    assert f"kernels: {KernelSet.default('cpu')}" in lines
    make_engine(folder)
    assert capsys.readouterr().err == ""
