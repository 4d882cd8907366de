"""Two sets of kernels in a whole engine: what differs is found, and what does not is not."""

from __future__ import annotations

import gc
import json
import math
import weakref

import pytest
import torch
from microvllm import InferenceEngine, KernelSet, compare
from microvllm.engine.lab.comparison import Comparison, LogitError, TextComparison
from microvllm.engine.lab.rounding import SHARE, one_rounding
from microvllm.kernels.linear import linear_reference
from microvllm.kernels.rms_norm import rms_norm_reference
from microvllm.model.qwen2 import Qwen2

from .small_engine import save_tokenizer
from .small_models import VOCAB_SIZE, Shape, make_model

PROMPTS = [[5, 3, 900, 4, 11], [17, 80], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]]
REFERENCE = KernelSet.reference()
OPTIONS = {"device": "cpu", "max_tokens": 12, "turns": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(Shape(), folder)
    save_tokenizer(folder)
    return str(folder)


def wide_norm(x, weight, eps):
    """A right kernel, which rounds once where the reference rounds twice."""
    return rms_norm_reference(x.float(), weight.float(), eps).to(x.dtype)


def scaled_norm(x, weight, eps):
    return 1.02 * rms_norm_reference(x, weight, eps)


def norm_without_numbers(x, weight, eps):
    return x * torch.nan


def norm_that_fails_late(x, weight, eps):
    """Right for prompts, wrong for single tokens."""
    return rms_norm_reference(x, weight, eps) * (1.05 if len(x) == len(PROMPTS) else 1)


class TestVerdict:
    def test_a_set_beside_itself(self, folder):
        comparison = compare(folder, REFERENCE, REFERENCE, PROMPTS, **OPTIONS)
        assert comparison.ok and comparison.same_tokens == 1 and comparison.first_difference is None
        assert comparison.error == LogitError(0, 0) and comparison.changed == {}
        assert comparison.rounding.rms > 0
        assert [len(text.tokens_a) for text in comparison.texts] == [12, 12, 12]
        assert comparison.delta is None and "nothing is changed" in comparison.verdict

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_a_right_kernel_that_rounds_otherwise_is_right(self, folder, dtype):
        comparison = compare(folder, REFERENCE, REFERENCE.replace(rms_norm=wide_norm), PROMPTS, dtype=dtype, **OPTIONS)
        assert comparison.ok and comparison.dtype == dtype
        assert comparison.changed["rms_norm"] == ("reference", "wide_norm")
        assert dtype == "float32" or comparison.error.rms > 0

    def test_products_that_sum_in_another_order_are_right(self, folder):
        comparison = compare(folder, KernelSet.default("cpu"), REFERENCE, PROMPTS, **OPTIONS)
        assert comparison.ok and comparison.error.rms > 0 and comparison.same_tokens == 1

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("kernel", [scaled_norm, norm_that_fails_late])
    def test_a_wrong_kernel_is_wrong(self, folder, dtype, kernel):
        comparison = compare(folder, REFERENCE, REFERENCE.replace(rms_norm=kernel), PROMPTS, dtype=dtype, **OPTIONS)
        assert not comparison.ok and "times one rounding; 2 are allowed" in comparison.verdict

    def test_logits_that_are_no_numbers_are_wrong_and_not_timed(self, folder):
        b = REFERENCE.replace(rms_norm=norm_without_numbers)
        comparison = compare(folder, REFERENCE, b, PROMPTS, **{**OPTIONS, "turns": 2})
        assert not comparison.ok and comparison.verdict.startswith("b's logits are not numbers")
        assert comparison.ms_a == () and comparison.first_difference == 0
        assert comparison.texts[0].differing_words[1] == "no number" and comparison.texts[0].margin is None
        assert str(comparison) and comparison.plot()
        with pytest.raises(ValueError, match="nothing to compare with: a failed: the model's logits"):
            compare(folder, b, REFERENCE, PROMPTS, **OPTIONS)


class TestTexts:
    def test_the_first_token_that_differs_is_that_of_free_generation(self, folder):
        b = REFERENCE.replace(rms_norm=norm_that_fails_late)
        comparison = compare(folder, REFERENCE, b, PROMPTS, **OPTIONS)
        engines = [
            InferenceEngine(folder, kernels=k, device="cpu", num_blocks=8, progress=False) for k in (REFERENCE, b)
        ]
        free = [e.generate(PROMPTS, max_tokens=12, ignore_eos=True) for e in engines]
        found = []
        for text, mine, theirs in zip(comparison.texts, *free, strict=True):
            assert list(text.tokens_a) == mine.token_ids
            pairs = zip(mine.token_ids, theirs.token_ids, strict=True)
            found.append(next((i for i, (x, y) in enumerate(pairs) if x != y), None))
        assert found == [text.first_difference for text in comparison.texts] and any(found)

    def test_what_is_said_later_is_judged_after_the_same_tokens(self, folder):
        """A head that is wrong at the prompt's end alone says something else there, and is right behind it."""
        heads = []

        def wrong_once(x, weight, bias=None):
            y = linear_reference(x, weight, bias)
            if len(weight) == VOCAB_SIZE:
                heads.append(x)
                y = y.roll(1, dims=1) if len(heads) == 1 else y
            return y

        comparison = compare(folder, REFERENCE, REFERENCE.replace(linear=wrong_once), [[5, 6, 7]], **OPTIONS)
        (text,) = comparison.texts
        assert len(heads) == 12 and text.first_difference == 0 and text.tokens_b[1:] == text.tokens_a[1:]
        assert text.error_by_token[0] > 0.1 and set(text.error_by_token[1:]) == {0.0}

    def test_texts_come_as_words_or_chats_or_ids(self, folder):
        prompts = ["hello there", [{"role": "user", "content": "hi"}], [5, 6]]
        comparison = compare(folder, REFERENCE, REFERENCE, prompts, **OPTIONS)
        assert comparison.texts[0].prompt == "hello there" and len(comparison.texts) == 3
        assert len(compare(folder, REFERENCE, REFERENCE, "hello", **OPTIONS).texts) == 1

    def test_a_model_without_a_tokenizer_speaks_in_ids(self, tmp_path):
        make_model(Shape(), tmp_path)
        comparison = compare(tmp_path, REFERENCE, REFERENCE, [[5, 6]], **OPTIONS)
        assert comparison.texts[0].prompt == "[5, 6]"


class TestEngines:
    @pytest.fixture
    def models(self, monkeypatch):
        """The most models with weights of their own that were alive at once."""
        alive, most = weakref.WeakSet(), []
        prepare = Qwen2.prepare

        def counted(model):
            gc.collect()
            alive.add(model)
            most.append(len(alive))
            prepare(model)

        monkeypatch.setattr(Qwen2, "prepare", counted)
        return most

    def test_weights_are_loaded_once(self, folder, models):
        compare(folder, REFERENCE, REFERENCE.replace(rms_norm=wide_norm), PROMPTS, **{**OPTIONS, "turns": 2})
        assert models == [1]

    def test_where_layouts_differ_there_is_one_model_at_a_time(self, folder, models):
        compare(folder, KernelSet.default("cpu"), REFERENCE, PROMPTS, **{**OPTIONS, "turns": 2})
        assert models == [1] * 6  # a; b; and four turns, the first of which finds b there

    def test_turns_alternate(self, folder, monkeypatch):
        asked, generate = [], InferenceEngine.generate

        def watched(engine, prompts, *rest, **options):
            asked.append((engine.kernels is REFERENCE, options["max_tokens"]))
            return generate(engine, prompts, *rest, **options)

        monkeypatch.setattr(InferenceEngine, "generate", watched)
        b = REFERENCE.replace(rms_norm=wide_norm)
        comparison = compare(folder, REFERENCE, b, PROMPTS, **{**OPTIONS, "turns": 3})
        assert asked == [(True, 12), (True, 8), (True, 12), (False, 8), (False, 12), *[(True, 12), (False, 12)] * 2]
        assert len(comparison.ms_a) == len(comparison.ms_b) == 3
        assert comparison.a.low <= comparison.a.median <= comparison.a.high

    def test_another_engine_on_the_same_weights(self, folder):
        engine = InferenceEngine(folder, kernels=REFERENCE, device="cpu", num_blocks=8, progress=False)
        other = engine.with_kernels(REFERENCE.replace(rms_norm=scaled_norm))
        mine, theirs = engine.runner.model, other.runner.model
        assert [p.data_ptr() for p in mine.parameters()] == [p.data_ptr() for p in theirs.parameters()]
        assert mine.cos is theirs.cos and theirs.layers[0].mlp.kernels is other.kernels is not mine.kernels
        assert engine.runner.cache[0][0].data_ptr() != other.runner.cache[0][0].data_ptr()
        before = engine.generate(PROMPTS, max_tokens=4)
        other.generate(PROMPTS, max_tokens=4)
        assert [o.token_ids for o in engine.generate(PROMPTS, max_tokens=4)] == [o.token_ids for o in before]
        with pytest.raises(ValueError, match=r"read the weight of .* in another layout"):
            engine.with_kernels(KernelSet.default("cpu"))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_tokens": 0}, "max_tokens=0 must be an integer of at least 1"),
        ({"turns": -1}, "turns=-1 must be an integer of at least 0"),
        ({"max_tokens": 1, "turns": 1}, "needs max_tokens of at least 2"),
        ({"num_blocks": 3}, "compare chooses num_blocks itself"),
        ({"kernel": 3}, "unknown option kernel=3"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[5] * 120]}, "has 120 tokens: with 12 more it is over 128"),
        ({"prompts": [[VOCAB_SIZE]]}, f"token id {VOCAB_SIZE} of the prompt"),
        ({"prompts": 5}, "prompts must be a text, token ids, a chat"),
    ],
)
def test_what_cannot_be_is_refused(folder, options, words):
    with pytest.raises(ValueError, match=words):
        compare(folder, REFERENCE, REFERENCE, **{"prompts": PROMPTS, **OPTIONS, **options})


def made_up(**changes) -> Comparison:
    text = TextComparison(
        "<b>hi", "there", (1, 2, 3), (1, 5, 3), 1, 0.25, ("</pre>", "&"), LogitError(0.5, 0.1), (0.1, 0.5, 0.2)
    )
    fields = {
        "model": "m",
        "device": "d",
        "dtype": "bfloat16",
        "changed": {"rms_norm": ("triton", "<lambda>")},
        "texts": (text,),
        "error": LogitError(0.5, 0.1),
        "rounding": LogitError(0.3, 0.08),
        "ms_a": (10.0, 11.0, 10.5, 10.5, 10.5),
        "ms_b": (9.0, 9.5, 9.6, 9.5, 9.5),
    }
    return Comparison(**{**fields, **changes})


class TestShown:
    def test_as_text(self):
        assert str(made_up()).splitlines() == [
            "m in bfloat16 on d: b is as right as a, 66.7% equal tokens, 9.5% faster (rms_norm: triton → <lambda>)",
            "  prompt   tokens  equal    first to differ  margin there  logit error       rms",
            "  '<b>hi'       3      2  1: '</pre>' / '&'          0.25     5.00e-01  1.00e-01",
            "  all logits: error 5.00e-01, rms 1.00e-01; one rounding more makes 3.00e-01, rms 8.00e-02; "
            "2 times that is allowed",
            "  a token: a 10.5 ms (10 to 11), b 9.5 ms (9 to 9.6), b − a -1 ms (-1.5 to -0.9), over 5 turns each",
        ]

    def test_a_difference_within_the_spread_is_none(self):
        assert "no difference in time beyond its spread (+4.8%)" in made_up(ms_b=(10.5, 10.0, 11.0, 11.0, 11.0)).verdict

    def test_few_turns_say_nothing_of_speed(self):
        words = made_up(ms_a=(10.0,) * 4, ms_b=(9.0,) * 4).verdict
        assert "equal tokens, in fewer than 5 turns no word on its speed (rms" in words

    def test_in_a_notebook_with_all_text_escaped(self):
        html = made_up()._repr_html_()
        assert "&lt;b&gt;hi" in html and "<b>" not in html and "&lt;/pre&gt;" in html and "&lt;lambda&gt;" in html

    def test_as_json(self, tmp_path):
        path = made_up(error=LogitError(math.nan, math.nan)).save(tmp_path / "c.json")
        saved = json.loads(path.read_text(), parse_constant=pytest.fail)
        assert saved["kind"] == "comparison" and saved["ok"] is False and saved["error"]["largest"] is None
        assert saved["texts"][0]["tokens_b"] == [1, 5, 3] and saved["ms_a"] == [10.0, 11.0, 10.5, 10.5, 10.5]
        assert {"date", "versions", "commit", "command"} <= saved.keys() and saved["device"] == "d"

    def test_as_a_picture(self):
        figure = made_up().plot()
        errors, times = figure.axes
        assert list(errors.lines[0].get_ydata()) == [0.1, 0.5, 0.2]
        assert [list(line.get_ydata()) for line in times.lines] == [
            [10.0, 11.0, 10.5, 10.5, 10.5],
            [9.0, 9.5, 9.6, 9.5, 9.5],
        ]
        assert figure._repr_png_().startswith(b"\x89PNG")
        assert len(made_up(ms_a=(), ms_b=()).plot().axes) == 1


class TestRounding:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_it_errs_as_much_as_rounding_does(self, dtype):
        generator = torch.Generator().manual_seed(0)
        truth = 1 + torch.rand(400_000, dtype=torch.float64, generator=generator)  # one ulp for all
        x = truth.to(dtype)
        rounding = float((x.double() - truth).square().mean().sqrt())
        added = float((one_rounding(x, generator).double() - x.double()).square().mean().sqrt())
        if dtype != torch.float32:
            assert added == pytest.approx(rounding, rel=0.05)
        else:
            assert rounding < added < 5 * rounding

    def test_zeros_and_what_is_no_number_stay(self):
        x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan] * 1000, dtype=torch.float16)
        moved = one_rounding(x, torch.Generator().manual_seed(0))
        assert torch.equal(moved.view(torch.int16), x.view(torch.int16)) and 0 < SHARE < 1


def test_changes_are_seen_between_callables_of_one_name():
    def one():
        def kernel(x, weight, eps):
            return x

        return kernel

    a, b = REFERENCE.replace(rms_norm=one()), REFERENCE.replace(rms_norm=one())
    assert set(a.changes(b)) == {"rms_norm"} and a.changes(a) == {}
