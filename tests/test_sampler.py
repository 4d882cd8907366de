"""The sampler: what is drawn, what a draw depends on, what is filtered, penalised and reported."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from microvllm import KernelSet, SamplingParams
from microvllm.kernels.sampling import _keep_top, gumbel_noise, sample_reference
from microvllm.model.grammar import Grammar
from microvllm.model.logprobs import TokenLogprobs
from microvllm.model.occurrences import Occurrences
from microvllm.model.penalties import adjust, adjusts
from microvllm.model.sampler import Sampler
from transformers import RepetitionPenaltyLogitsProcessor

VOCAB_SIZE = 50


@dataclass
class Row:
    params: SamplingParams
    seed: int = 0
    token_ids: list[int] = field(default_factory=lambda: [1, 2, 3])
    num_prompt: int = 3
    stop_token_ids: frozenset[int] = frozenset()
    num_pending: int = 0
    grammar: Grammar | None = None
    occurrences: Occurrences = field(default_factory=Occurrences)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending


def row(seed: int = 0, prompt=(1, 2, 3), output=(), stop_token_ids=(), **options) -> Row:
    return Row(SamplingParams(**options), seed, [*prompt, *output], len(prompt), frozenset(stop_token_ids))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(logits: torch.Tensor, rows: list[Row]) -> list[int]:
    return Sampler(KernelSet.reference())(logits, rows).result()[0]


def adjusted(logits: torch.Tensor, *rows: Row) -> torch.Tensor:
    """The logits that each row's draw gets to see, the one that counts."""
    seen = []

    def record(logits, *rest, **more):
        seen.append(logits)
        return sample_reference(logits, *rest, **more)

    Sampler(KernelSet.reference().replace(sample=record))(logits, rows)
    last = seen[0].clone()
    for again in seen[1:]:
        last[[i for i, row in enumerate(rows) if adjusts(row)]] = again
    return last


def draws(logits: torch.Tensor, count: int, *, seed: int = 0, temperature: float = 1.0) -> torch.Tensor:
    """Draws 0 … count − 1 of one request, from the same logits."""
    return sample_reference(
        logits.expand(count, -1),
        torch.full((count,), temperature),
        None,
        None,
        None,
        torch.full((count,), seed),
        torch.arange(count),
    )


class TestDraw:
    others = (
        {"temperature": 0.0},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.4},
        {"temperature": 0.7, "min_p": 0.2},
        {"temperature": 1.0, "repetition_penalty": 1.5, "logit_bias": {7: 3.0}},
        {"temperature": 1.5, "presence_penalty": 1.0, "logprobs": 3},
        {"temperature": 1.0, "min_tokens": 5},
    )

    @pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}], ids=str)
    def test_it_depends_on_the_seed_and_its_number_alone(self, options):
        """Not on the row, the size or the order of the batch, nor on what the others ask for."""
        alone = []
        for i in range(20):
            logits = normal(1, VOCAB_SIZE, seed=i)
            mine = row(seed=77, output=[4] * i, temperature=1.0, **options)
            (token,) = tokens_of(logits, [mine])
            alone.append(token)
            batch = [row(seed=s, output=[9, 9], **o) for s, o in enumerate(self.others)]
            noise = normal(len(batch), VOCAB_SIZE, seed=1000 + i)
            for place in (0, 3, len(batch)):
                rows = [*batch[:place], mine, *batch[place:]]
                mixed = torch.cat([noise[:place], logits, noise[place:]])
                assert tokens_of(mixed, rows)[place] == token
                assert tokens_of(mixed.flip(0), rows[::-1])[len(batch) - place] == token
        assert len(set(alone)) > 8  # they are draws indeed

    def test_equal_logits_give_equal_tokens_in_every_row(self):
        same = tokens_of(normal(1, VOCAB_SIZE).expand(8, -1), [row(seed=5, temperature=1.0)] * 8)
        assert len(set(same)) == 1

    def test_another_number_or_another_seed_draws_anew(self):
        logits = torch.zeros(1, 1000)
        by_number = draws(logits, 200)
        by_seed = torch.cat([draws(logits, 1, seed=seed) for seed in range(200)])
        for drawn in (by_number, by_seed):  # 200 balls in 1000 bins hit 181 on average, standard deviation 4
            assert 165 <= len(set(drawn.tolist())) <= 197
        assert not by_number.equal(draws(logits, 200, seed=1))
        assert (by_number == by_seed).sum() <= 3  # draw i with seed 0 has nothing to do with draw 0 with seed i

    @pytest.mark.parametrize("seed", [0, -1, 1, 2**63 - 1, -(2**63)])
    @pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
    def test_tokens_come_as_often_as_softmax_says(self, seed, temperature):
        logits, count = normal(10, seed=3), 20_000
        expected = (logits.double() / temperature).softmax(0) * count
        counted = draws(logits, count, seed=seed, temperature=temperature).bincount(minlength=10)
        chi_square = ((counted - expected) ** 2 / expected).sum()
        assert chi_square < 33.7  # one in 10,000 is over it at 9 degrees of freedom

    def test_filtered_tokens_come_as_often_as_their_share_of_the_rest(self):
        logits, count = torch.tensor([3.0, 2.5, 2.0, 1.0, 0.0]), 4000
        expected = logits[:3].double().softmax(0) * count
        rows = [row(seed=i, temperature=1.0, top_k=3) for i in range(count)]
        counted = torch.tensor(tokens_of(logits.expand(count, -1), rows)).bincount(minlength=5)
        assert counted[3:].tolist() == [0, 0]
        chi_square = ((counted[:3] - expected) ** 2 / expected).sum()
        assert chi_square < 18.4  # one in 10,000 is over it at 2 degrees of freedom

    def test_the_noise_is_gumbel_distributed_in_every_row_and_column(self):
        noise = gumbel_noise(torch.arange(200), torch.arange(200) % 7, 1000).double()
        uniform = (-(-noise).exp()).exp()
        for values in (uniform.flatten(), *uniform[:5], *uniform.t()[:5]):
            n = values.numel()
            steps = torch.arange(n + 1, dtype=torch.float64) / n
            ordered = values.sort().values
            distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
            assert distance * math.sqrt(n) < 2.23  # Kolmogorov and Smirnov: one in 10,000 is over it
        for neighbours in (uniform[1:] * uniform[:-1], uniform[:, 1:] * uniform[:, :-1]):
            assert abs(neighbours.mean() - 0.25) < 4 * math.sqrt(7 / 144 / neighbours.numel())

    def test_a_seed_draws_the_same_for_ever(self):
        """A change of these numbers changes what every user's seed gives."""
        assert draws(torch.zeros(1, 1000), 5, seed=42).tolist() == [656, 934, 941, 653, 685]

    def test_temperature_zero_takes_the_likeliest_beside_rows_that_draw(self):
        logits = normal(6, VOCAB_SIZE)
        greedy, hot = row(), row(temperature=1.0)
        assert tokens_of(logits, [greedy] * 6) == logits.argmax(1).tolist()
        mixed = tokens_of(logits, [greedy, hot] * 3)
        assert mixed[::2] == logits[::2].argmax(1).tolist()

    def test_a_tiny_temperature_takes_the_likeliest(self):
        logits = normal(20, VOCAB_SIZE)
        for temperature in (1e-6, 1e-40, 1e-300):
            rows = [row(seed=i, temperature=temperature) for i in range(20)]
            assert tokens_of(logits, rows) == logits.argmax(1).tolist()


def kept_by(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    """The tokens that the filters leave, in the documented order: temperature, top-k, top-p, min-p."""
    kept = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = kept[:top_k] if top_k else kept
    weight = {token: math.exp((logits[token] - logits[kept[0]]) / temperature) for token in kept}
    total, reached, nucleus = sum(weight.values()), 0.0, []
    for token in kept:
        nucleus.append(token)
        reached += weight[token] / total
        if top_p < 1 and reached >= top_p:
            break
    return [token for token in nucleus if weight[token] >= min_p * weight[kept[0]]]


FILTERS = [
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": VOCAB_SIZE},
    {"top_k": 10**9},
    {"top_p": 0.313},
    {"top_p": 0.871},
    {"top_p": 1e-9},
    {"min_p": 0.11},
    {"min_p": 1.0},
    {"top_k": 7, "top_p": 0.613},
    {"top_k": 12, "min_p": 0.21},
    {"top_p": 0.713, "min_p": 0.31},
    {"top_k": 9, "top_p": 0.813, "min_p": 0.17},
    {},
]


class TestFilters:
    @pytest.mark.parametrize("ties", [False, True], ids=["distinct logits", "ties"])
    @pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
    @pytest.mark.parametrize("options", [*FILTERS, "mixed"], ids=str)
    def test_the_draw_is_the_best_of_what_a_plain_loop_keeps(self, options, temperature, ties):
        generator = random.Random(0)
        for trial in range(4):
            logits = 2 * normal(20, VOCAB_SIZE, seed=trial)
            logits = logits.round() if ties else logits
            each = [generator.choice(FILTERS) if options == "mixed" else options for _ in logits]
            rows = [row(seed=trial, output=[0] * i, temperature=temperature, **o) for i, o in enumerate(each)]
            noise = gumbel_noise(torch.full((20,), trial), torch.arange(20), VOCAB_SIZE)
            for i, token in enumerate(tokens_of(logits, rows)):
                kept = kept_by(logits[i].tolist(), temperature, **{"top_k": 0, "top_p": 1, "min_p": 0} | each[i])
                assert token == max(kept, key=lambda t: logits[i, t] / temperature + noise[i, t])

    def test_each_filter_lets_every_kept_token_through_and_no_other(self):
        logits = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0, 2.9])
        for options in ({"top_k": 2}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 4, "min_p": 0.9}):
            rows = [row(seed=i, temperature=1.0, **options) for i in range(400)]
            kept = kept_by(logits.tolist(), 1.0, **{"top_k": 0, "top_p": 1, "min_p": 0} | options)
            assert len(kept) < 6
            assert set(tokens_of(logits.expand(400, -1), rows)) == set(kept)

    def test_the_likeliest_stays_however_small_top_p_is(self):
        logits = normal(30, VOCAB_SIZE)
        rows = [row(seed=i, temperature=5.0, top_p=1e-300) for i in range(30)]
        assert tokens_of(logits, rows) == logits.argmax(1).tolist()

    def test_a_filter_that_is_off_cuts_nothing_beside_a_row_that_uses_it(self):
        """Not even tokens so unlikely that the probability before them rounds to 1."""
        scores = torch.cat([torch.zeros(1), torch.full((9,), -20.0)]).expand(2, -1)
        kept = _keep_top(scores, None, torch.tensor([1.0, 0.5]))
        assert kept[0].equal(scores[0])
        assert kept[1].isfinite().tolist() == [True] + [False] * 9
        kept = _keep_top(scores, torch.tensor([10, 2]), None)
        assert kept[0].equal(scores[0])
        assert kept[1].isfinite().sum() == 2


class TestPenalties:
    def test_repetition_is_transformers_own(self):
        logits = normal(3, VOCAB_SIZE)
        texts = [[1, 2, 3, 7, 7, 9], [0, 0, 0, 49], [5, 6, 7]]
        for penalty in (1.3, 0.8):
            rows = [row(prompt=t[:2], output=t[2:], temperature=1.0, repetition_penalty=penalty) for t in texts]
            processor = RepetitionPenaltyLogitsProcessor(penalty)
            expected = [processor(torch.tensor([t]), logits[i : i + 1])[0] for i, t in enumerate(texts)]
            torch.testing.assert_close(adjusted(logits, *rows), torch.stack(expected), rtol=0, atol=0)

    def test_presence_and_frequency_count_the_output_and_not_the_prompt(self):
        logits = normal(1, VOCAB_SIZE)
        expected = logits.clone()
        expected[0, 4] -= 0.5 + 0.25
        expected[0, 6] -= 0.5 + 3 * 0.25
        mine = row(
            prompt=[1, 1, 6],
            output=[6, 4, 6, 6],
            temperature=1.0,
            presence_penalty=0.5,
            frequency_penalty=0.25,
        )
        torch.testing.assert_close(adjusted(logits, mine), expected, rtol=0, atol=1e-6)
        presence_alone = row(output=[4, 4], temperature=1.0, presence_penalty=-2.0)
        assert adjusted(logits, presence_alone)[0, 4] == logits[0, 4] + 2

    def test_biases_are_added(self):
        logits = normal(1, VOCAB_SIZE)
        expected = logits.clone()
        expected[0, 3] += 1.5
        expected[0, 8] -= 100
        assert adjusted(logits, row(temperature=1.0, logit_bias={3: 1.5, 8: -100})).equal(expected)

    def test_all_of_them_in_one_batch_each_on_its_own_row(self):
        logits = normal(5, VOCAB_SIZE)
        rows = [
            row(temperature=1.0),
            row(output=[4], temperature=1.0, presence_penalty=1.0),
            row(output=[4], temperature=1.0, logit_bias={4: 2.0}),
            row(output=[4], temperature=1.0, repetition_penalty=2.0),
            row(temperature=1.0, min_tokens=1, stop_token_ids=[4]),
        ]
        together = adjusted(logits, *rows)
        for i, mine in enumerate(rows):
            assert together[i].equal(adjusted(logits[i : i + 1], mine)[0])
        assert (together != logits).any(dim=1).tolist() == [False, True, True, True, True]

    def test_penalty_bias_and_repetition_meet_on_one_token_in_this_order(self):
        logits = torch.full((1, VOCAB_SIZE), 4.0)
        mine = row(output=[9], temperature=1.0, repetition_penalty=2.0, presence_penalty=1.0, logit_bias={9: 0.5})
        assert adjusted(logits, mine)[0, 9] == 4.0 / 2.0 - 1.0 + 0.5

    def test_min_tokens_forbids_the_ends_until_then(self):
        logits = torch.zeros(1, VOCAB_SIZE)
        logits[0, [5, 6, 7]] = torch.tensor([9.0, 8.0, 7.0])
        for temperature in (0.0, 0.01):
            chosen = [
                tokens_of(logits, [row(output=[1] * n, min_tokens=2, stop_token_ids=[5, 6], temperature=temperature)])
                for n in range(4)
            ]
            assert chosen == [[7], [7], [5], [5]]

    def test_greedy_choices_follow_them_too(self):
        logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
        assert tokens_of(logits, [row(prompt=[0])]) == [1]
        assert tokens_of(logits, [row(prompt=[1], repetition_penalty=2.0)]) == [2]
        assert tokens_of(logits, [row(prompt=[0], output=[1], presence_penalty=1.5)]) == [2]
        assert tokens_of(logits, [row(prompt=[0], output=[1, 1, 2], frequency_penalty=1.5)]) == [3]
        assert tokens_of(logits, [row(prompt=[0], logit_bias={3: 50})]) == [3]

    def test_the_models_logits_stay_as_they_are(self):
        logits = normal(2, VOCAB_SIZE)
        before = logits.clone()
        options = {"repetition_penalty": 2.0, "presence_penalty": 1.0, "logit_bias": {4: 5.0}, "min_tokens": 3}
        filters = {"top_k": 5, "top_p": 0.5, "min_p": 0.1, "logprobs": 2}
        tokens_of(logits, [row(stop_token_ids=[7], temperature=t, **options, **filters) for t in (0.0, 1.0)])
        assert logits.equal(before)


def test_it_makes_no_difference_whether_the_host_or_the_device_knows_the_newest_token():
    generator = random.Random(0)
    known, pending, newest = [], [], []
    for _ in range(200):
        output = generator.choices(range(8), k=generator.randint(1, 6))
        options = {
            "repetition_penalty": generator.choice([1.0, 1.3, 0.7]),
            "presence_penalty": generator.choice([0.0, 0.3]),
            "frequency_penalty": generator.choice([0.0, 0.7, -0.2]),
            "logit_bias": generator.choice([{}, {2: 1.7, 5: -0.3}]),
            "min_tokens": generator.choice([0, 4]),
            "stop_token_ids": generator.choice([(), (1, 3)]),
        }
        known.append(row(output=output, **options))
        fewer = known[-1].token_ids[:-1]
        pending.append(replace(known[-1], token_ids=fewer, num_pending=1, occurrences=Occurrences()))
        newest.append(output[-1])
    logits = normal(200, 8)
    expected = adjust(logits, known, None)
    assert not expected.equal(logits)
    assert adjust(logits, pending, torch.tensor(newest)).equal(expected)


class TestLogprobs:
    def test_they_are_the_models_before_penalties_and_temperature(self):
        logits = normal(3, VOCAB_SIZE)
        rows = [
            row(temperature=3.0, top_k=5, logit_bias={30: 20.0}, logprobs=4),
            row(repetition_penalty=1.9, logprobs=0),
            row(temperature=1.0),
        ]
        tokens, reported = Sampler(KernelSet.reference())(logits, rows).result()
        assert tokens[0] == 30
        for i in (0, 1):
            expected = logits[i].double().log_softmax(0)
            assert reported[i].token_id == tokens[i]
            assert reported[i].logprob == pytest.approx(float(expected[tokens[i]]), abs=1e-5)
        best = logits[0].double().log_softmax(0).topk(4)
        assert [token for token, _ in reported[0].top] == best.indices.tolist()
        assert [value for _, value in reported[0].top] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert reported[1].top == []
        assert reported[2] is None

    def test_asking_for_more_than_there_are_gives_all(self):
        (entry,) = TokenLogprobs(normal(1, 5), torch.tensor([2]), 100).result()
        assert sorted(token for token, _ in entry.top) == list(range(5))
        assert sum(math.exp(value) for _, value in entry.top) == pytest.approx(1, abs=1e-5)

    def test_asking_for_them_changes_no_token(self):
        logits = normal(4, VOCAB_SIZE)
        asked, silent = ([row(seed=i, temperature=1.0, **o) for i in range(4)] for o in ({"logprobs": 5}, {}))
        assert tokens_of(logits, asked) == tokens_of(logits, silent)


@pytest.mark.parametrize("temperatures", [(0.0,), (1.0,), (0.0, 1.0)], ids=["greedy", "drawn", "mixed"])
@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01}, {"logprobs": 2}], ids=str)
@pytest.mark.parametrize("poison", ["one NaN", "all NaN", "one +inf", "all −inf"])
def test_a_row_that_holds_no_numbers_fails_alone(poison, options, temperatures):
    healthy = normal(5, VOCAB_SIZE)
    rows = [row(seed=i, temperature=temperatures[i % len(temperatures)], **options) for i in range(6)]
    bad = normal(1, VOCAB_SIZE, seed=1)
    bad[0, 7 if poison.startswith("one") else slice(None)] = float(poison.split()[1].replace("−", "-"))
    expected, expected_logprobs = Sampler(KernelSet.reference())(healthy, [*rows[:2], *rows[3:]]).result()
    logits = torch.cat([healthy[:2], bad, healthy[2:]])
    tokens, logprobs = Sampler(KernelSet.reference())(logits, rows).result()
    assert (tokens[2], logprobs[2]) == (-1, None)
    assert tokens[:2] + tokens[3:] == expected and min(expected) >= 0
    assert logprobs[:2] + logprobs[3:] == expected_logprobs


def test_minus_infinity_beside_numbers_is_a_token_that_is_never_drawn():
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 1:] = -torch.inf
    assert tokens_of(logits.expand(50, -1), [row(seed=i, temperature=2.0) for i in range(50)]) == [0] * 50
