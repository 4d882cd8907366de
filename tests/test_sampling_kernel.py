"""The Triton draw against the reference, token by token, and by which of its ways it comes to a token.

The launch constants are made so small that a few dozen logits are many chunks, long lists and several passes.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from microvllm.kernels import gumbel, sampling, sampling_draw, sampling_summary
from microvllm.kernels.gumbel import gumbel_noise
from microvllm.kernels.sampling import sample_reference, top_k_top_p_sample

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="it counts calls inside Triton's interpreter"),
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow) encountered:RuntimeWarning"),
]

INF = float("inf")
OFF = 10**9  # of top_k
_launch = sampling._launch  # before it is replaced
LISTED = 16
SMALL = {
    "both": {"GROUP": 4},
    "summarize": {"CHUNK": 32, "STEP": 8, "VECTOR": 2, "num_warps": 1},
    "draw": {"WANTED": 2, "RANKED": LISTED, "LISTED": LISTED, "BLOCK": 64, "num_warps": 1},
}


@pytest.fixture
def ways(monkeypatch) -> Counter:
    """How often each part of the kernel ran, with the small constants."""
    counts = Counter()

    def count(module, name):
        function = getattr(module, name)

        def counted(*args):
            result = function(*args)
            counts["search_of_list" if name == "_search" and args[1] is not None else name.strip("_")] += 1
            if name == "_list":
                counts["too long"] += int(result.handle.data.item() > LISTED)
            return result

        monkeypatch.setattr(module, name, counted)

    count(sampling_summary, "_race_in_full")
    for name in ("_list", "_draw_ranked", "_search", "_mass_of_top"):
        count(sampling_draw, name)
    monkeypatch.setattr(sampling, "_launch", lambda *sizes: SMALL)
    return counts


@pytest.fixture
def long(ways, monkeypatch) -> Counter:
    """As `ways`, with lists four times as long, of which the longer ones are searched."""
    monkeypatch.setattr(sampling, "_launch", lambda *sizes: SMALL | {"draw": SMALL["draw"] | {"LISTED": 4 * LISTED}})
    return ways


def column(values: list, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def arguments(logits, temperature=1.0, top_k=OFF, top_p=1.0, min_p=0.0, seed=0) -> list[torch.Tensor]:
    """All rows ask for the same, and are successive draws of one request."""
    rows = len(logits)
    return [
        logits,
        column([temperature] * rows, torch.float32),
        column([top_k] * rows, torch.int64),
        column([top_p] * rows, torch.float32),
        column([min_p] * rows, torch.float32),
        column([seed] * rows, torch.int64),
        torch.arange(rows),
    ]


def assert_same(args: list) -> list[int]:
    tokens = top_k_top_p_sample(*args)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == sample_reference(*args).tolist()
    return tokens.tolist()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES = {
    "flat": lambda x: x,
    "peaked": lambda x: 2 * x + 16 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) ** 6,
    "steep": lambda x: 100 * x,
    "ties": lambda x: (2 * x).round(),
    "equal": torch.zeros_like,
    "ascending": lambda x: 3 * x.sort().values,
    "descending": lambda x: 3 * x.sort(descending=True).values,
    "scores that tie": lambda x: torch.where(x > 2, 3000.0, 1e-4 * x),
    "half −inf": lambda x: torch.where(x > 0, x, -INF),
}


class TestEveryWay:
    @pytest.mark.parametrize("lists, last", [("ways", "mass_of_top"), ("long", "search_of_list")])
    def test_random_rows_draw_what_the_reference_draws(self, lists, last, request):
        ways = request.getfixturevalue(lists)
        generator = random.Random(0)
        for trial, shape in enumerate(SHAPES.values()):
            for vocab in (generator.randint(1, 60), generator.randint(61, 200)):
                logits = shape(normal(4, vocab, seed=trial))

                def some(*values, dtype=torch.float32):
                    return column(generator.choices(values, k=4), dtype)

                columns = [
                    some(1, 2, 4, 5, 8, 9, 17, 40, vocab, OFF, dtype=torch.int64),
                    some(1.0, 1.0, 1e-6, 0.313, 0.713, 0.987),
                    some(0.0, 0.0, 1e-3, 0.05, 0.31, 1.0),
                ]
                filters = [x if generator.random() < 0.7 else None for x in columns]
                seeds = some(-(1 << 63), -1, 0, 7, (1 << 63) - 1, dtype=torch.int64)
                temperature = some(0.0, 1e-40, 1e-3, 0.7, 1.0, 1.0, 1.7, 30.0)
                assert_same([logits, temperature, *filters, seeds, torch.arange(4)])
        for way in ("draw_ranked", "too long", "search", last):
            assert ways[way] >= 5, (way, ways)
        assert ways["list"] - ways["draw_ranked"] - ways["search_of_list"] >= 5  # lists that did not suffice

    def test_rows_of_all_kinds_share_a_batch_and_nothing_else(self, ways):
        logits = normal(6, 100)
        temperature = column([0.0, 0.7, 1.0, 1.0, 1.0, 1.3], torch.float32)
        top_k = column([OFF, OFF, 3, OFF, OFF, 40], torch.int64)
        top_p = column([1.0, 1.0, 0.71, 0.9, 1.0, 0.9], torch.float32)
        min_p = column([0.0, 0.0, 0.0, 0.0, 0.2, 0.01], torch.float32)
        args = [logits, temperature, top_k, top_p, min_p, torch.arange(6), torch.arange(6)]
        tokens = assert_same(args)
        assert tokens == [top_k_top_p_sample(*(x[i : i + 1] for x in args)).item() for i in range(6)]

    def test_neither_greedy_nor_unfiltered_rows_are_listed(self, ways):
        assert_same(arguments(normal(4, 100), temperature=0.0, top_k=3, top_p=0.5))
        assert_same(arguments(normal(4, 100)))
        assert_same(arguments(normal(4, 100), top_k=100))
        assert not ways.keys() - {"race_in_full"}


class TestRace:
    @pytest.mark.parametrize("temperature", [0.5, 2.0])
    def test_all_tokens_are_timed_where_one_vector_does_not_suffice(self, temperature, ways):
        chunks = 0
        for trial, shape in enumerate(SHAPES.values()):
            assert_same(arguments(shape(normal(4, 150, seed=trial)), temperature=temperature, seed=trial))
            chunks += 4 * triton.cdiv(150, SMALL["summarize"]["CHUNK"])
        assert chunks // 100 < ways["race_in_full"] < chunks // 2

    def test_a_token_whose_bound_is_the_least_may_lose(self, ways):
        """An even race of two: E is far above u where u is near 1."""
        logits = torch.full((64, 32), -INF)
        logits[:, 3], logits[:, 20] = 0.0, -1.0
        assert set(assert_same(arguments(logits, seed=1))) == {3, 20}
        assert ways["race_in_full"] >= 4

    def test_no_token_is_timed_twice_where_all_are_impossible(self, ways):
        logits = torch.full((8, 150), -INF)
        logits[:, 140] = 0.0
        assert assert_same(arguments(logits)) == [140] * 8
        assert not ways


class TestList:
    @pytest.mark.parametrize("top_k, vocab", [(1, 200), (4, 200), (6, 200), (3, 40), (4, 40)])
    @pytest.mark.parametrize("shape", ["flat", "steep"])
    def test_the_top_k_are_listed_once(self, shape, top_k, vocab, ways):
        assert_same(arguments(SHAPES[shape](normal(4, vocab)), temperature=2.0, top_k=top_k, top_p=0.9))
        assert ways["list"] == 4 and not ways["search"]

    def test_a_nucleus_that_the_list_lacks_is_in_the_next(self, ways):
        logits = torch.full((8, 200), -20.0)
        logits[:, 3:200:25] = torch.linspace(1, 2, 8)
        assert_same(arguments(logits, top_p=0.9))
        assert ways["list"] == 16 and ways["draw_ranked"] == 8 and not ways["search"]

    def test_tokens_that_crowd_in_one_chunk_are_listed(self, ways):
        logits = normal(6, 300)
        logits[:, 64:96] += 8
        assert_same(arguments(logits, temperature=3.0, top_k=3))
        assert not ways["search"]

    def test_more_neighbours_than_the_list_holds_are_searched_for(self, ways):
        logits = SHAPES["descending"](normal(6, 300))
        assert_same(arguments(logits, temperature=9.0, top_k=8))
        assert ways["too long"] and ways["search"] == 6

    def test_min_p_alone_suffices(self, ways):
        assert_same(arguments(SHAPES["peaked"](normal(6, 300)), min_p=0.5))
        assert not ways["search"]


class TestLongList:
    @pytest.mark.parametrize("top_k", [17, 20])
    @pytest.mark.parametrize("shape", ["flat", "ties"])
    def test_many_top_k_are_searched_in_the_list(self, shape, top_k, long):
        assert_same(arguments(SHAPES[shape](normal(6, 300)), temperature=2.0, top_k=top_k, top_p=0.9, min_p=0.01))
        assert long["search_of_list"] == long["list"] == 6 and not long["search"]

    def test_of_equals_the_first_stay(self, long):
        logits = torch.full((12, 300), -9.0)
        logits[:, 7::15] = 1.0
        logits[:, 100] = 2.0
        drawn = assert_same(arguments(logits, temperature=50.0, top_k=15, top_p=0.99))
        assert set(drawn) <= {100, *range(7, 7 + 14 * 15, 15)}
        assert long["search_of_list"] == 12 and not long["search"]

    def test_a_nucleus_of_many(self, long):
        logits = torch.full((6, 300), -20.0)
        logits[:, 3::8] = torch.linspace(1, 2, 38)
        assert_same(arguments(logits, top_p=0.8))
        assert long["search_of_list"] == 6 and not long["search"]

    def test_what_a_longer_list_could_not_hold_is_not_listed(self, long):
        assert_same(arguments(normal(6, 3000), top_p=0.9))
        assert long["search"] == long["list"] == 6

    def test_a_longer_list_may_reach_min_p(self, long):
        assert_same(arguments(normal(6, 3000), top_p=0.95, min_p=0.4))
        assert long["list"] > 6 and not long["search"]

    def test_with_as_many_as_on_a_gpu(self, ways, monkeypatch):
        monkeypatch.setattr(sampling, "_launch", _launch)
        assert_same(arguments(normal(2, 32000), top_k=600, top_p=0.9))
        assert ways["search_of_list"] == ways["list"] == 2 and not ways["search"]


class TestTies:
    @pytest.mark.parametrize("top_k", [1, 2, 6])
    def test_of_equal_logits_in_several_chunks_the_first_stay(self, top_k, ways):
        logits = torch.zeros(6, 200)
        logits[:, [190, 150, 90, 40, 41, 5]] = 1.0
        logits[:, 100] = 2.0
        drawn = assert_same(arguments(logits, temperature=50.0, top_k=top_k))
        assert set(drawn) <= set([100, 5, 40, 41, 90, 150][:top_k])
        assert not ways["search"]

    def test_equal_rows_are_searched(self, ways):
        drawn = assert_same(arguments(torch.zeros(5, 200), top_k=5))
        assert set(drawn) <= set(range(5))
        assert ways["search"] == 5

    def test_tokens_tie_by_score_though_their_logits_differ(self, ways):
        """The list's bound is the logit of token 150, and tokens 10 and 60 have less, but the same score."""
        logits = torch.full((12, 200), -1000.0)
        logits[:, 199] = 1000.0
        logits[:, [10, 60, 150]] = torch.tensor([0.0, 1e-6, 2e-6])
        drawn = assert_same(arguments(logits, temperature=3000.0, top_k=2))
        assert set(drawn) == {199, 10}
        assert not ways["search"]


class TestSearch:
    @pytest.mark.parametrize("top_p", [0.6, 0.9])
    def test_a_wide_nucleus(self, top_p, ways):
        assert_same(arguments(normal(4, 300), top_p=top_p))
        assert ways["search"] and not ways["mass_of_top"]

    def test_top_p_takes_its_share_of_the_top_k(self, ways):
        assert_same(arguments(normal(4, 300), top_k=100, top_p=0.6))
        assert ways["search"] == ways["mass_of_top"] == 4

    def test_of_a_top_k_that_ends_among_equals(self, ways):
        logits = torch.zeros(6, 200)
        logits[:, 150] = 1.0
        drawn = assert_same(arguments(logits, top_k=100, top_p=0.5))
        assert 20 < max(token for token in drawn if token != 150) < 50
        assert ways["search"] == ways["mass_of_top"] == 6

    @pytest.mark.parametrize("shape", ["flat", "equal"])
    def test_at_a_top_p_of_zero_the_likeliest_stays(self, shape, ways):
        logits = SHAPES[shape](normal(3, 200))
        logits[:, :50] -= 10
        assert assert_same(arguments(logits, top_p=0.0)) == logits.argmax(dim=1).tolist()
        assert bool(ways["search"]) == (shape == "equal")

    def test_min_p_keeps_many(self, ways):
        assert_same(arguments(normal(4, 300), min_p=0.02))
        assert ways["search"] == 4


@pytest.mark.parametrize("asked", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_rows_without_numbers_have_no_draw(asked, ways):
    logits = normal(6, 100)
    logits[1, 99] = torch.nan
    logits[2, 0] = INF
    logits[3] = -INF
    logits[4, 1:] = -INF
    logits[5, 32:64] = -INF
    tokens = assert_same(arguments(logits, **asked))
    assert tokens[1:5] == [-1, -1, -1, 0]
    assert min(tokens[0], tokens[5]) >= 0


def test_rows_may_be_apart_or_the_same():
    wide = normal(4, 130)
    for logits in (wide[:, 7:107], wide[:1, :100].expand(4, -1), wide[::2, 3:]):
        assert_same(arguments(logits, top_k=9, top_p=0.9))


def test_what_does_not_fit_is_refused():
    args = arguments(normal(2, 10))
    wrong = {
        "logits": [args[0].double(), args[0][0], args[0].T.contiguous().T, args[0][:, :0]],
        "temperature": [args[1].double(), args[1][:1], args[1][:, None]],
        "top_k": [args[2].int()],
        "top_p": [args[3].double()],
        "min_p": [args[4][:1]],
        "seed": [args[5].int()],
        "index": [args[6].float()],
    }
    for place, values in enumerate(wrong.values()):
        for value in values:
            with pytest.raises(ValueError, match=r"logits|vocab|temperature|top_k|top_p|min_p|seed|index"):
                top_k_top_p_sample(*args[:place], value, *args[place + 1 :])


@pytest.mark.parametrize(
    "vocab", [1, 2500, 32000, 33000, 49152, 65536, 73448, 96000, 128256, 151936, 152064, 262144, sampling.MAX_VOCAB]
)
def test_chunks_and_groups_fit_a_program_and_groups_are_many(vocab):
    launch = sampling._launch(vocab)
    assert triton.cdiv(vocab, launch["summarize"]["CHUNK"]) <= 64
    assert min(vocab // 8, 3000) <= triton.cdiv(vocab, launch["both"]["GROUP"]) <= 8192


@triton.jit
def _exponential_kernel(state_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, gumbel.exponential_at(tl.load(state_ptr + i).to(tl.uint64)))


@triton.jit
def _exponential_of_token_kernel(seed_ptr, index_ptr, y_ptr, SIZE: tl.constexpr):
    token = tl.arange(0, SIZE)
    tl.store(y_ptr + token, gumbel.exponential(gumbel.stream_of(seed_ptr, index_ptr, 0), token))


def state_of(bits: int) -> int:
    """The state whose hash begins with these 32 bits: SplitMix64's mixing, undone."""

    def unshift(x: int, shift: int) -> int:
        y = x
        for _ in range(64 // shift):
            y = x ^ (y >> shift)
        return y

    x = unshift(bits << 32 | 12345, 31)
    for shift, factor in ((27, 0x94D049BB133111EB), (30, 0xBF58476D1CE4E5B9)):
        x = unshift(x * pow(factor, -1, 1 << 64) % (1 << 64), shift)
    return x - (1 << 64) if x >> 63 else x


class TestExponential:
    def test_it_is_log1p_wherever_u_lies(self):
        edges = [0, 1, 2, 3, 1 << 31, (1 << 32) - 1, (1 << 32) - 129, (1 << 32) // 3, (1 << 32) // 3 * 2]
        near = [bits + step for bits in edges for step in range(-40, 41)]
        spread = random.Random(0)
        near += [int(2 ** spread.uniform(0, 32)) for _ in range(2000)] + spread.choices(range(1 << 32), k=1300)
        bits = [b for b in near if 0 <= b < 1 << 32]
        bits += [5] * (4096 - len(bits))
        e = torch.empty(len(bits))
        _exponential_kernel[(1,)](column([state_of(b) for b in bits], torch.int64), e, len(bits))
        u = ((column(bits, torch.int64).float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
        expected = -torch.log1p(-u)
        assert (e.view(torch.int32) - expected.view(torch.int32)).abs().max() <= 2
        assert e.max() < 17

    def test_its_noise_is_the_references(self):
        for seed, index in ((0, 0), (-1, 5), ((1 << 63) - 1, 1 << 40), (-(1 << 63), 3)):
            seed, index, e = column([seed], torch.int64), column([index], torch.int64), torch.empty(1024)
            _exponential_of_token_kernel[(1,)](seed, index, e, 1024)
            torch.testing.assert_close(-e.log(), gumbel_noise(seed, index, 1024)[0], rtol=3e-7, atol=3e-7)
