"""Each operator's reference against its formula, written out in Python's own floats on shapes small enough for it."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from microvllm.kernels import linear
from microvllm.kernels.linear import linear_reference, onednn_linear, onednn_prepare
from microvllm.kernels.paged_attention import paged_attention_reference
from microvllm.kernels.prefill_attention import flash_attn_prefill, prefill_attention_reference
from microvllm.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from microvllm.kernels.rotary import rotary_reference
from microvllm.kernels.rotary_store_kv import rotary_store_kv_reference, store_kv_reference
from microvllm.kernels.swiglu import swiglu_reference

EPS = 1e-5
BLOCK_SIZE = 4
KV_HEADS, GROUP, HEAD_DIM = 2, 3, 4
HEADS = KV_HEADS * GROUP


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_equal(got: torch.Tensor, formula: list) -> None:
    torch.testing.assert_close(got, torch.tensor(formula, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def naive_rms_norm(rows: list[list[float]], weight: list[float]) -> list[list[float]]:
    result = []
    for row in rows:
        root = math.sqrt(sum(x * x for x in row) / len(row) + EPS)
        result.append([x / root * w for x, w in zip(row, weight, strict=True)])
    return result


def naive_attention(q: list[float], keys: list[list[float]], values: list[list[float]], scale: float) -> list[float]:
    scores = [scale * sum(a * b for a, b in zip(q, key, strict=True)) for key in keys]
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [
        sum(e * value[d] for e, value in zip(exponentials, values, strict=True)) / sum(exponentials)
        for d in range(len(q))
    ]


class TestRmsNorm:
    def test_it_is_its_formula(self):
        x, weight = random(3, 5), random(5, seed=1)
        assert_equal(rms_norm_reference(x, weight, EPS), naive_rms_norm(x.tolist(), weight.tolist()))

    def test_the_last_dimension_is_normed_whatever_stands_before_it(self):
        x, weight = random(2, 3, 4), random(4, seed=1)
        flat = naive_rms_norm(x.view(6, 4).tolist(), weight.tolist())
        assert_equal(rms_norm_reference(x, weight, EPS).view(6, 4), flat)

    def test_zeros_stay_zeros(self):
        assert_equal(rms_norm_reference(torch.zeros(1, 4, dtype=torch.float64), random(4), EPS), [[0.0] * 4])

    def test_half_precision_squares_in_float32(self):
        x = torch.full((1, 4), 1000.0, dtype=torch.float16)  # its square is beyond float16
        y = rms_norm_reference(x, torch.ones(4, dtype=torch.float16), EPS)
        assert y.dtype == torch.float16 and y.tolist() == [[1.0] * 4]

    def test_with_the_residual_added_first(self):
        x, residual, weight = random(3, 5), random(3, 5, seed=1), random(5, seed=2)
        total = [
            [a + b for a, b in zip(*rows, strict=True)] for rows in zip(x.tolist(), residual.tolist(), strict=True)
        ]
        kept = x.clone(), residual.clone()
        normed, stream = add_rms_norm_reference(x, residual, weight, EPS)
        assert_equal(stream, total)
        assert_equal(normed, naive_rms_norm(total, weight.tolist()))
        assert x.equal(kept[0]) and residual.equal(kept[1])


def test_swiglu_is_its_formula():
    gate_up = random(3, 8)
    gate, up = gate_up[:, :4].tolist(), gate_up[:, 4:].tolist()
    formula = [[g / (1 + math.exp(-g)) * u for g, u in zip(*rows, strict=True)] for rows in zip(gate, up, strict=True)]
    assert_equal(swiglu_reference(gate_up), formula)


class TestRotary:
    frequencies = (1.0, 0.25)

    def table(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.outer(torch.arange(positions, dtype=torch.float64), torch.tensor(self.frequencies).double())
        return angles.cos(), angles.sin()

    def test_it_rotates_the_halves_of_a_head_by_its_position(self):
        q, k, positions = random(3, 2, 4), random(3, 1, 4, seed=1), [5, 0, 7]

        def formula(x: torch.Tensor) -> list:
            result = []
            for heads, position in zip(x.tolist(), positions, strict=True):
                result.append([])
                for a, b, c, d in heads:
                    (cos0, sin0), (cos1, sin1) = (
                        (math.cos(position * f), math.sin(position * f)) for f in self.frequencies
                    )
                    result[-1].append(
                        [a * cos0 - c * sin0, b * cos1 - d * sin1, c * cos0 + a * sin0, d * cos1 + b * sin1]
                    )
            return result

        rotated_q, rotated_k = rotary_reference(q, k, *self.table(8), torch.tensor(positions))
        assert_equal(rotated_q, formula(q))
        assert_equal(rotated_k, formula(k))

    def test_a_product_depends_on_the_distance_alone(self):
        q, k = random(1, 1, 4), random(1, 1, 4, seed=1)

        def product(q_position: int, k_position: int) -> float:
            table = self.table(64)
            rotated_q = rotary_reference(q, k, *table, torch.tensor([q_position]))[0]
            rotated_k = rotary_reference(q, k, *table, torch.tensor([k_position]))[1]
            return float((rotated_q * rotated_k).sum())

        assert product(9, 2) == pytest.approx(product(47, 40), rel=1e-12)
        assert product(9, 2) != pytest.approx(product(9, 3), rel=1e-3)

    def test_position_zero_and_the_dtype_stay(self):
        q, k = random(1, 2, 4).bfloat16(), random(1, 1, 4, seed=1).bfloat16()
        rotated_q, rotated_k = rotary_reference(q, k, *(t.float() for t in self.table(1)), torch.tensor([0]))
        assert rotated_q.dtype == torch.bfloat16 and rotated_q.equal(q) and rotated_k.equal(k)


def test_store_kv_writes_each_row_to_its_slot_and_negative_slots_nowhere():
    k, v = random(4, KV_HEADS, HEAD_DIM), random(4, KV_HEADS, HEAD_DIM, seed=1)
    before = random(3, BLOCK_SIZE, KV_HEADS, HEAD_DIM, seed=2)
    k_cache, v_cache = before.clone(), -before
    store_kv_reference(k, v, k_cache, v_cache, torch.tensor([9, -1, 0, 7]))
    written = {(2, 1): 0, (0, 0): 2, (1, 3): 3}  # (block, offset) → row
    for block in range(3):
        for offset in range(BLOCK_SIZE):
            row = written.get((block, offset))
            assert k_cache[block, offset].equal(before[block, offset] if row is None else k[row])
            assert v_cache[block, offset].equal(-before[block, offset] if row is None else v[row])


def test_rotary_store_kv_is_rotary_and_the_write_of_what_it_rotated():
    q, k, v = random(3, HEADS, HEAD_DIM), random(3, KV_HEADS, HEAD_DIM, seed=1), random(3, KV_HEADS, HEAD_DIM, seed=2)
    angles = random(8, HEAD_DIM // 2, seed=3)
    rotation = angles.cos(), angles.sin(), torch.tensor([5, 0, 7])
    slots = torch.tensor([6, -1, 1])
    before = random(2, BLOCK_SIZE, KV_HEADS, HEAD_DIM, seed=4)
    caches, expected = (before.clone(), -before), (before.clone(), -before)
    rotated = rotary_store_kv_reference(q, k, v, *rotation, *caches, slots)
    rotated_q, rotated_k = rotary_reference(q, k, *rotation)
    store_kv_reference(rotated_k, v, *expected, slots)
    assert rotated.equal(rotated_q)
    assert caches[0].equal(expected[0]) and caches[1].equal(expected[1])
    assert caches[0][1, 2].equal(rotated_k[0]) and not caches[0][1, 2].equal(k[0])


class PoisonedCache:
    """Texts of some lengths in a paged cache, blocks scattered, NaN wherever none of them is.

    Table entries past a context point far outside the cache.
    """

    def __init__(self, contexts: list[int]):
        longest = max(-(-n // BLOCK_SIZE) for n in contexts) + 1
        count = sum(-(-n // BLOCK_SIZE) for n in contexts) + 2
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        self.keys = [random(n, KV_HEADS, HEAD_DIM, seed=2 * i) for i, n in enumerate(contexts)]
        self.values = [random(n, KV_HEADS, HEAD_DIM, seed=2 * i + 1) for i, n in enumerate(contexts)]
        self.k = torch.full((count, BLOCK_SIZE, KV_HEADS, HEAD_DIM), torch.nan, dtype=torch.float64)
        self.v = self.k.clone()
        self.block_table = torch.full((len(contexts), longest), 10**6, dtype=torch.int32)
        self.context_lens = torch.tensor(contexts, dtype=torch.int32)
        for i, context in enumerate(contexts):
            for position in range(context):
                slot, offset = divmod(position, BLOCK_SIZE)
                if offset == 0:
                    self.block_table[i, slot] = order.pop()
                self.k[self.block_table[i, slot], offset] = self.keys[i][position]
                self.v[self.block_table[i, slot], offset] = self.values[i][position]

    def attend(self, q: torch.Tensor, text: int, visible: int, scale: float) -> list[list[float]]:
        """One token's heads over the first `visible` tokens; query head h reads key-value head h // GROUP."""
        keys, values = self.keys[text][:visible], self.values[text][:visible]
        return [
            naive_attention(q[h].tolist(), keys[:, h // GROUP].tolist(), values[:, h // GROUP].tolist(), scale)
            for h in range(HEADS)
        ]


class TestPagedAttention:
    def test_it_is_its_formula_and_reads_nothing_outside_the_contexts(self):
        contexts, scale = [1, 4, 0, 5, 11], 0.7
        cache = PoisonedCache(contexts)
        q = random(len(contexts), HEADS, HEAD_DIM, seed=99)
        got = paged_attention_reference(q, cache.k, cache.v, cache.block_table, cache.context_lens, scale)
        formula = [cache.attend(q[i], i, n, scale) if n else [[0.0] * HEAD_DIM] * HEADS for i, n in enumerate(contexts)]
        assert_equal(got, formula)

    def test_a_padded_row_gives_zeros_even_if_the_whole_cache_is_poison(self):
        cache = PoisonedCache([3])
        cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)
        lengths = torch.zeros(1, dtype=torch.int32)
        got = paged_attention_reference(random(1, HEADS, HEAD_DIM), cache.k, cache.v, cache.block_table, lengths, 1.0)
        assert_equal(got, [[[0.0] * HEAD_DIM] * HEADS])

    def test_half_precision_comes_back_as_it_went_in(self):
        cache = PoisonedCache([5])
        q = random(1, HEADS, HEAD_DIM)
        k, v = cache.k.bfloat16(), cache.v.bfloat16()
        got = paged_attention_reference(q.bfloat16(), k, v, cache.block_table, cache.context_lens, 0.5)
        truth = torch.tensor([cache.attend(q[0], 0, 5, 0.5)])
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), truth, rtol=0.02, atol=0.02)


class TestPrefillAttention:
    contexts, lengths, scale = (3, 9, 5, 8), (3, 2, 1, 5), 0.7  # whole prompt, later chunk, one token, cached prefix

    def run(self, cache: PoisonedCache, q: torch.Tensor) -> torch.Tensor:
        query_start = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        where = (cache.block_table, query_start, cache.context_lens, max(self.lengths), max(self.contexts))
        return prefill_attention_reference(q, cache.k, cache.v, *where, self.scale)

    def test_it_is_its_formula_on_a_ragged_batch_and_reads_nothing_outside_the_contexts(self):
        cache = PoisonedCache(list(self.contexts))
        q = random(sum(self.lengths), HEADS, HEAD_DIM, seed=99)
        formula, row = [], 0
        for text, (context, length) in enumerate(zip(self.contexts, self.lengths, strict=True)):
            for i in range(length):
                formula.append(cache.attend(q[row], text, context - length + i + 1, self.scale))
                row += 1
        assert_equal(self.run(cache, q), formula)

    def test_a_query_does_not_see_what_comes_after_it(self):
        cache = PoisonedCache(list(self.contexts))
        q = random(sum(self.lengths), HEADS, HEAD_DIM, seed=99)
        before = self.run(cache, q)
        last = cache.block_table[0, 0]
        cache.k[last, 2] += 1
        cache.v[last, 2] += 1
        after = self.run(cache, q)
        changed = [not before[i].equal(after[i]) for i in range(len(q))]
        assert changed == [False, False, True] + [False] * (len(q) - 3)


class TestLinear:
    @pytest.mark.parametrize("rows", [1, 2, 3, 8, 33])
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_the_reference_and_onednn_are_the_formula(self, rows, with_bias):
        x, weight = random(rows, 5), random(7, 5, seed=1)
        bias = random(7, seed=2) if with_bias else None
        formula = [
            [
                sum(a * b for a, b in zip(row, w, strict=True)) + (bias[o].item() if with_bias else 0.0)
                for o, w in enumerate(weight.tolist())
            ]
            for row in x.tolist()
        ]
        assert_equal(linear_reference(x, weight, bias), formula)
        narrow = onednn_linear(x.float(), onednn_prepare(weight.float()), None if bias is None else bias.float())
        torch.testing.assert_close(narrow, torch.tensor(formula, dtype=torch.float32))

    @pytest.mark.parametrize("rows", [1, 2, 3, 8, 33])
    def test_onednn_takes_any_strides_and_changes_nothing(self, rows):
        x, weight = random(5, rows).t().float(), random(7, 10, seed=1)[:, ::2].float()
        kept = x.clone(), weight.clone()
        torch.testing.assert_close(onednn_linear(x, onednn_prepare(weight)), linear_reference(x, weight))
        assert x.equal(kept[0]) and weight.equal(kept[1])

    def test_onednn_refuses_dtypes_it_does_not_multiply(self, monkeypatch):
        with pytest.raises(ValueError, match=r"float32 and bfloat16 on a CPU, not torch.float16.*linear='reference'"):
            onednn_prepare(torch.zeros(4, 4, dtype=torch.float16))
        monkeypatch.setattr(linear, "onednn_has_bfloat16", lambda: False)
        with pytest.raises(ValueError, match=r"with AVX-512, and this one has none: choose float32, .*'reference'"):
            onednn_prepare(torch.zeros(4, 4, dtype=torch.bfloat16))


class TestFlashAttn:
    """The adapter, on a stand-in for the library, which needs a GPU."""

    @pytest.fixture
    def calls(self, monkeypatch):
        calls, module = [], ModuleType("flash_attn")
        module.flash_attn_varlen_func = lambda *args, **options: calls.append((args, options))
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        return calls

    def run(self, block_size: int, dtype: torch.dtype) -> tuple:
        q, k, v = torch.zeros(5, 2, 8, dtype=dtype), *torch.zeros(2, 3, block_size, 1, 8, dtype=dtype)
        table = torch.tensor([[0], [1]], dtype=torch.int32)
        query_start, contexts = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([3, 9], dtype=torch.int32)
        flash_attn_prefill(q, k, v, table, query_start, contexts, 3, 9, 0.5)
        return q, k, v, table, query_start

    def test_a_block_size_that_it_cannot_page_is_refused_with_a_way_out(self, calls):
        with pytest.raises(
            ValueError, match=r"multiples of 256 .* block size is 16: use block_size=256, or the impl.*--kernel"
        ):
            self.run(16, torch.float16)
        assert not calls

    def test_a_dtype_that_it_does_not_compute_in_is_refused_with_a_way_out(self, calls):
        with pytest.raises(
            ValueError,
            match=r"float16 and bfloat16, not in torch.float32: choose one of these, or the implementation prefill_",
        ):
            self.run(256, torch.float32)
        assert not calls

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_it_is_told_where_everything_lies(self, calls, dtype):
        q, k, v, table, query_start = self.run(256, dtype)
        ((args, options),) = calls
        assert all(given is expected for given, expected in zip(args, (q, k, v), strict=True))
        assert options["block_table"] is table and options["cu_seqlens_q"] is query_start
        assert options["cu_seqlens_k"].tolist() == [0, 3, 12] and options["cu_seqlens_k"].dtype == torch.int32
        assert (options["max_seqlen_q"], options["max_seqlen_k"], options["softmax_scale"]) == (3, 9, 0.5)
        assert options["causal"] is True
