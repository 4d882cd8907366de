"""The Hopper kernel of prefill attention in an emulator of what it runs on, which mistakes are seen there, and what it
does not take; tests/gpu checks what it computes on a GPU.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from microvllm.engine.model_graph import PREFILL_CHUNKS, PREFILL_TOKENS
from microvllm.kernels import hopper_prefill, prefill_attention
from microvllm.kernels.hopper_prefill import refused_by_hopper
from microvllm.kernels.op import Case
from microvllm.kernels.prefill_attention import HOPPER_OVER, OP

from .gluon_emulator import emulate, plant

RAGGED = Case(prompts=3, query=140, shortest=0, heads=2, kv_heads=1, head_dim=128, block_size=16, prefix=250)
LONG = Case(prompts=1, query=130, heads=1, kv_heads=1, head_dim=64, block_size=256, prefix=400)


def checked(module, monkeypatch, case: Case):
    emulate(monkeypatch, module, multiprocessors=2)
    return OP.check(module.hopper_prefill, [case], dtypes=[torch.float16], device="cpu")


class TestInTheEmulator:
    @pytest.mark.parametrize("case", [RAGGED, LONG], ids=str)
    def test_it_is_as_right_as_the_reference(self, monkeypatch, case):
        report = checked(hopper_prefill, monkeypatch, case)
        assert report.ok, f"\n{report}"

    def test_padding_changes_no_bit(self, monkeypatch):
        """As a captured prefill is padded: empty chunks at the end, tokens of no chunk, bounds that nothing reaches."""
        emulate(monkeypatch, hopper_prefill, multiprocessors=2)
        generator = torch.Generator().manual_seed(0)
        given = OP.inputs(**RAGGED.sizes, dtype=torch.float16, device=torch.device("cpu"), generator=generator)
        expected = hopper_prefill.hopper_prefill(**given)
        tokens = len(given["q"])
        padded = given | {
            "q": torch.nn.functional.pad(given["q"], (0, 0, 0, 0, 0, 90), value=torch.nan),
            "block_table": torch.nn.functional.pad(given["block_table"], (0, 0, 0, 2), value=-1),
            "query_start": torch.nn.functional.pad(given["query_start"], (0, 2), value=tokens),
            "context_lens": torch.nn.functional.pad(given["context_lens"], (0, 2)),
            "max_query_len": 1024,
        }
        assert hopper_prefill.hopper_prefill(**padded)[:tokens].equal(expected)

    @pytest.mark.parametrize(
        "right, wrong, problem",
        [
            pytest.param(
                """acc, p = warpgroup_mma_wait(0, deps=(acc, p))
                    mbarrier.arrive(v_empty.index(before))""",
                """mbarrier.arrive(v_empty.index(before))
                    acc, p = warpgroup_mma_wait(0, deps=(acc, p))""",
                "NaN",
                id="V given back before it is read",
            ),
            pytest.param(
                "mbarrier.wait(v_ready.index(before), v_phase)", "pass", "raised", id="V read before it is there"
            ),
            pytest.param(
                "_clear_from(v, context - (tiles - 1) * BLOCK_N)", "pass", "NaN", id="0 · NaN behind the context"
            ),
            pytest.param(
                "(stage * PARTS + part) * PAGES + i", "(stage * PAGES + i) * PARTS + part", "NaN", id="pages mixed"
            ),
        ],
    )
    def test_it_sees_a_mistake(self, monkeypatch, tmp_path, right, wrong, problem):
        planted = plant(right, wrong, hopper_prefill, tmp_path)
        seen = [checked(planted, monkeypatch, case).problems for case in (RAGGED, LONG)]
        assert problem in set().union(*seen)


def test_what_it_takes():
    q, cache = torch.zeros(5, 4, 128).half(), torch.zeros(3, 16, 2, 128).half()
    assert refused_by_hopper(q, cache, cache) is None


@pytest.mark.parametrize(
    "q, cache, words",
    [
        (torch.zeros(5, 4, 128), torch.zeros(3, 16, 2, 128), "float16 and bfloat16, not in torch.float32"),
        (torch.zeros(5, 4, 128).half(), torch.zeros(3, 16, 2, 128), "the cache in q's dtype"),
        (torch.zeros(5, 4, 80).half(), torch.zeros(3, 16, 2, 80).half(), "head_dim 64 and 128, not 80"),
        (torch.zeros(5, 4, 64).half(), torch.zeros(3, 4, 2, 64).half(), "and multiples of 128, not 4"),
        (torch.zeros(5, 4, 64).half(), torch.zeros(3, 192, 2, 64).half(), "and multiples of 128, not 192"),
        (torch.zeros(5, 4, 66).half()[..., :64], torch.zeros(3, 16, 2, 64).half(), "aligned to 16 bytes"),
    ],
)
def test_what_it_refuses(q, cache, words):
    assert words in refused_by_hopper(q, cache, cache)


class TestWhatItIsFor:
    @pytest.fixture(autouse=True)
    def hopper(self, monkeypatch):
        """As if a CPU were an H100, as far as the choice goes."""
        monkeypatch.setattr(prefill_attention, "multiprocessors", lambda device: 132)

    @staticmethod
    def chosen(tokens: int, chunks: int, head_dim: int) -> bool:
        return prefill_attention._is_for_hopper(tokens, chunks, head_dim, torch.device("cpu"))

    @pytest.mark.parametrize(
        "tokens, chunks, head_dim, chosen",
        [
            (512, 1, 128, False),
            (513, 1, 128, True),
            (64 * 64, 64, 128, False),
            (64 * 100, 64, 128, True),
            (2048, 1, 64, False),
            (3072, 1, 64, True),
            (2620, 5, 64, False),
            (9000, 1, 80, False),
        ],
    )
    def test_the_tokens_together_and_of_a_chunk_decide(self, tokens, chunks, head_dim, chosen):
        assert self.chosen(tokens, chunks, head_dim) == chosen

    @pytest.mark.parametrize("head_dim", HOPPER_OVER)
    def test_a_captured_prefill_runs_the_kernel_of_the_same_one_uncaptured(self, head_dim):
        for before, size in pairwise((0, *PREFILL_TOKENS)):
            for chunks in range(1, PREFILL_CHUNKS + 1):
                for tokens in (max(before + 1, chunks), size):
                    assert self.chosen(tokens, chunks, head_dim) == self.chosen(size, PREFILL_CHUNKS, head_dim)
