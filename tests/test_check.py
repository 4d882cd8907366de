"""A check that cannot fail is a defect: wrong kernels are planted, and each is caught by the name of what is wrong."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from microvllm.kernels import rms_norm
from microvllm.kernels.op import Case, Implementation, Op, needs_gpu
from microvllm.kernels.rms_norm import rms_norm_reference

from .planted_kernels import (
    ATTENTION,
    DOUBLE,
    HALF,
    NORM,
    ROWS,
    SINGLE,
    TEXTS,
    attention,
    changed_input,
    error_raised,
    flat_output,
    forgotten_scale,
    heads_in_the_wrong_groups,
    infinity_in_one_place,
    judge,
    last_bit_by_chance,
    nan_in_one_place,
    no_output,
    norm,
    normed_in_place,
    one_token_less,
    one_token_more,
    out_of_bounds,
    out_of_bounds_in_front,
    padded_row_not_zero,
    read_before_written,
    swapped_k_and_v,
    swapped_k_heads,
    swapped_v_heads,
    two_outputs,
    unwritten_padded_row,
    unwritten_tail,
    wide_output,
)


class TestRight:
    @pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, SINGLE], ids=str)
    @pytest.mark.parametrize("op, kernel, case", [(NORM, norm, ROWS), (ATTENTION, attention, TEXTS)])
    def test_a_right_kernel_passes(self, op, kernel, case, dtype):
        report = judge(op, kernel, case, dtypes=[dtype])
        assert report.ok and not report.problems
        (result,) = report.results
        assert result.verdict == "right" and 0 < result.error <= result.allowed

    @pytest.mark.parametrize("dtype", [HALF, SINGLE, DOUBLE], ids=str)
    def test_the_reference_passes(self, dtype):
        assert judge(NORM, "reference", ROWS, dtypes=[dtype]).ok
        assert judge(ATTENTION, "reference", TEXTS, dtypes=[dtype]).ok

    def test_an_empty_batch_can_pass(self):
        assert judge(NORM, norm, Case(tokens=0, hidden=8)).ok


@pytest.mark.parametrize(
    "kernel, problem",
    [
        (one_token_less, "wrong values"),
        (one_token_more, "NaN"),  # what lies behind a text is poisoned
        (forgotten_scale, "wrong values"),
        (swapped_k_heads, "wrong values"),
        (swapped_v_heads, "wrong values"),
        (swapped_k_and_v, "wrong values"),
        (heads_in_the_wrong_groups, "wrong values"),
        (padded_row_not_zero, "wrong values"),
        (unwritten_padded_row, "unwritten output"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_attention_is_caught(kernel, problem):
    assert judge(ATTENTION, kernel, TEXTS).problems == {problem}


@pytest.mark.parametrize("context", [2, 50, 4000])
def test_a_forgotten_token_is_caught_whatever_the_length(context):
    case = Case(batch=1, context=context, heads=2, kv_heads=1, head_dim=64, block_size=16)
    assert judge(ATTENTION, attention, case).ok
    assert judge(ATTENTION, one_token_less, case).problems == {"wrong values"}


@pytest.mark.parametrize(
    "kernel, problems",
    [
        (unwritten_tail, {"unwritten output"}),
        (read_before_written, {"NaN", "not deterministic"}),
        (out_of_bounds, {"written out of bounds"}),
        (out_of_bounds_in_front, {"written out of bounds"}),
        (changed_input, {"changed argument"}),
        (normed_in_place, {"changed argument"}),
        (nan_in_one_place, {"NaN"}),
        (infinity_in_one_place, {"NaN"}),
        (last_bit_by_chance, {"not deterministic"}),
        (wide_output, {"wrong dtype"}),
        (flat_output, {"wrong shape"}),
        (no_output, {"wrong shape"}),
        (two_outputs, {"wrong shape"}),
        (error_raised, {"raised"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_norm_is_caught(kernel, problems):
    report = judge(NORM, kernel, ROWS, dtypes=[SINGLE])
    assert report.problems == problems and not report.ok


def test_output_that_stays_from_the_call_before_is_caught():
    first = {}

    def remembered(x, weight, eps):
        return first.setdefault(x.shape, norm(x, weight, eps)).clone()

    assert judge(NORM, remembered, ROWS).problems == {"stale output"}


def test_output_that_the_next_call_overwrites_is_caught():
    buffer = torch.empty(7, 100, dtype=HALF)
    assert judge(NORM, lambda *inputs: buffer.copy_(norm(*inputs)), ROWS).problems == {"stale output"}


def test_an_answer_to_the_call_before_is_caught():
    late = [torch.zeros(7, 100, dtype=HALF)]

    def one_call_late(*inputs):
        late.append(norm(*inputs))
        return late.pop(0)

    report = judge(NORM, one_call_late, ROWS)
    assert report.problems == {"wrong values", "not deterministic"}


class TestCheats:
    """Kernels that know a result instead of computing it."""

    def test_one_that_knows_its_inputs_by_their_address(self):
        results = {}

        def by_address(x, weight, eps):
            key = (x.data_ptr(), weight.data_ptr())
            if key not in results:
                results[key] = norm(x, weight, eps)
            return results[key].clone()

        assert judge(NORM, by_address, ROWS).problems == {"stale output"}

    def test_one_that_computes_only_at_first(self):
        calls = []

        def lazy(x, weight, eps):
            calls.append(norm(x, weight, eps))
            return calls[0].clone()

        assert judge(NORM, lazy, ROWS).problems == {"stale output"}

    @staticmethod
    def found(candidates, x, weight, eps):
        """The tensor among them whose first row is right; else nothing better than zeros."""
        row = norm(x[:1], weight, eps)
        for y in candidates:
            if isinstance(y, torch.Tensor) and y.shape == x.shape and (y[:1].to(x.dtype) - row).abs().max() < 1e-2:
                return y.to(x.dtype, copy=True)
        return torch.zeros_like(x)

    def test_one_that_looks_for_the_references_output_among_all_objects(self):
        def looking(x, weight, eps):
            return self.found([y for y in gc.get_objects() if issubclass(type(y), torch.Tensor)], x, weight, eps)

        there = norm_in_sight(ROWS)
        assert any(y is there for y in gc.get_objects()) and self.found([there], *inputs_of(ROWS)).any()
        del there
        assert judge(NORM, looking, ROWS).problems == {"wrong values"}

    def test_one_that_looks_for_it_in_the_frames_that_called_it(self):
        def opened(value):
            return value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]

        def looking(x, weight, eps):
            frame, seen = sys._getframe(), []
            while frame := frame.f_back:
                for value in frame.f_locals.values():
                    parts = [*opened(value), *getattr(value, "__dict__", {}).values()]
                    seen += [y for part in parts for y in opened(part)]
            return self.found(seen, x, weight, eps)

        def called_beside(there):
            return looking(*inputs_of(ROWS)).any()

        for hold in (lambda y: y, lambda y: [y], lambda y: (y,), lambda y: [(y,)], lambda y: {"y": [y]}):
            assert called_beside(hold(norm_in_sight(ROWS)))
        assert not called_beside(None)
        assert judge(NORM, looking, ROWS).problems == {"wrong values"}

    def test_what_the_reference_gave_is_not_left_in_freed_memory(self):
        given, running = [], []

        def watched(x, weight, eps):
            y = rms_norm_reference(x, weight, eps)
            given.append(y)
            return y

        def kernel(x, weight, eps):
            running.append(len(given))
            return norm(x, weight, eps)

        op = Op("norm", reference=watched, inputs=rms_norm.make_inputs)
        assert judge(op, kernel, ROWS).ok
        assert running == [0, 0, 0] and len(given) == 4
        assert all(y.isnan().all() for y in given)

    def test_one_that_returns_memory_as_it_finds_it(self):
        def unwritten(x, weight, eps):
            return torch.empty_like(x)

        assert judge(NORM, norm, ROWS).ok  # whose result now lies freed
        assert judge(NORM, unwritten, ROWS).problems == {"unwritten output"}


def inputs_of(case):
    inputs = rms_norm.make_inputs(**case.sizes, dtype=HALF, device=None, generator=torch.Generator().manual_seed(0))
    return inputs["x"], inputs["weight"], inputs["eps"]


def norm_in_sight(case):
    return norm(*inputs_of(case))


class TestBounds:
    """They are narrow: what a good kernel reaches, and not three times of it."""

    def times(self, factor):
        """A kernel whose error is that of the reference times a factor, but for a rounding."""

        def kernel(x, weight, eps):
            truth = rms_norm_reference(x.double(), weight.double(), eps)
            return (truth + factor * (rms_norm_reference(x, weight, eps).double() - truth)).to(x.dtype)

        return kernel

    @pytest.mark.parametrize("dtype", [HALF, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("seed", range(5))
    def test_three_times_the_error_of_the_reference_fails(self, dtype, seed):
        case = Case(tokens=64, hidden=256)
        assert judge(NORM, self.times(1), case, dtypes=[dtype], seed=seed).ok
        assert judge(NORM, self.times(3), case, dtypes=[dtype], seed=seed).problems == {"wrong values"}

    def test_a_small_error_everywhere_fails_by_its_root_mean_square(self):
        def shifted(x, weight, eps):
            y = norm(x, weight, eps)
            return y + y.abs().max() * 2.0**-12

        report = judge(NORM, shifted, Case(tokens=64, hidden=256))
        (result,) = report.results
        assert report.problems == {"wrong values"} and result.error <= result.allowed
        assert "rms error" in str(report)

    @pytest.mark.parametrize("roundings, places", [(4, slice(None)), (8, (3, 14))], ids=["everywhere", "one place"])
    def test_few_roundings_of_the_largest_fail_in_float32(self, roundings, places):
        def shifted(x, weight, eps):
            y = norm(x, weight, eps)
            y[places] += roundings * torch.finfo(SINGLE).eps * y.abs().max()
            return y

        assert judge(NORM, shifted, ROWS, dtypes=[SINGLE]).problems == {"wrong values"}


def simple(reference, inputs, **options):
    """An operator of one tensor, which `inputs` makes of random numbers [8, 8]."""

    def make_inputs(*, dtype, device, generator):
        return {"x": inputs(torch.randn(8, 8, dtype=dtype, device=device, generator=generator))}

    return Op("simple", reference=reference, inputs=make_inputs, cases=(Case(),), **options)


class TestValues:
    def test_where_the_reference_is_exact_one_rounding_of_the_largest_is_allowed(self):
        ulp = torch.finfo(HALF).eps  # of 1, and half of that of 3

        def off_by(ulps):
            return lambda x: torch.cat((x[:, :7], x[:, 7:] + ulps * ulp), dim=1)

        op = simple(lambda x: x.clone(), lambda x: torch.ones_like(x).index_fill_(1, torch.tensor([0, 1]), 3))
        assert judge(op, off_by(1), Case()).ok
        assert judge(op, off_by(2), Case()).problems == {"wrong values"}

    def test_a_truth_beyond_the_dtype_is_infinite(self):
        op = simple(lambda x: x * x, lambda x: x.sign() * 1000)
        assert judge(op, lambda x: x * x, Case()).ok
        assert judge(op, lambda x: (x * x).clamp(max=65504), Case()).problems == {"wrong values"}

    def test_a_reference_that_overflows_allows_nothing(self):
        op = simple(lambda x: (x * 1000) * 0.001, lambda x: x.sign() * 100)
        assert judge(op, lambda x: x.clone(), Case()).ok
        assert judge(op, lambda x: 2 * x, Case()).problems == {"wrong values"}
        assert judge(op, lambda x: x * 1000, Case()).problems == {"NaN"}

    def test_nan_in_the_truth_must_be_there(self):
        op = simple(lambda x: x.sqrt(), lambda x: x)
        assert judge(op, lambda x: x.sqrt(), Case()).ok
        assert judge(op, lambda x: x.abs().sqrt(), Case()).problems == {"wrong values"}

    def test_integers_are_the_truths_or_the_references(self):
        op = simple(lambda x: x.argmax(dim=1), lambda x: x)
        assert judge(op, lambda x: x.max(dim=1).indices, Case()).ok
        report = judge(op, lambda x: (x.argmax(dim=1) + 1) % 8, Case())
        assert report.problems == {"wrong values"} and report.results[0].error == 8
        assert judge(op, lambda x: torch.empty(8, dtype=torch.int64), Case()).problems == {"unwritten output"}

    def test_every_output_is_judged(self):
        op = simple(lambda x: (x + 1, x - 1), lambda x: x)
        assert judge(op, lambda x: (x + 1, x - 1), Case()).ok
        assert "output 1[" in str(judge(op, lambda x: (x + 1, x - 2), Case()))


def write_rows(x, cache, slots):
    cache[slots] = x


def cache_inputs(*, dtype, device, generator):
    x = torch.randn(3, 4, dtype=dtype, device=device, generator=generator)
    slots = torch.randperm(9, device=device, generator=generator)[:3]
    return {"x": x, "cache": torch.full((9, 8), torch.nan, dtype=dtype, device=device)[:, ::2], "slots": slots}


class TestMutatedArguments:
    op = Op("write_rows", reference=write_rows, inputs=cache_inputs, mutates=("cache",))

    def test_what_is_written_right_passes(self):
        assert judge(self.op, write_rows, Case()).ok

    @pytest.mark.parametrize(
        "rows, slots, problem",
        [
            (lambda x: x[:0], lambda slots: slots[:0], "NaN"),
            (lambda x: x.flip(0), lambda slots: slots, "wrong values"),
            (lambda x: x, lambda slots: (slots + 1) % 9, "NaN"),
            (lambda x: x.repeat(3, 1), lambda slots: torch.cat((slots, (slots + 1) % 9, slots)), "wrong values"),
            (lambda x: x, lambda slots: slots.fill_(int(slots[0])), "changed argument"),
        ],
        ids=["nothing", "another order", "another place", "more than asked", "slots"],
    )
    def test_what_is_written_wrong_is_caught(self, rows, slots, problem):
        def kernel(x, cache, slot_mapping):
            write_rows(rows(x), cache, slots(slot_mapping))

        assert problem in judge(self.op, kernel, Case()).problems

    def test_what_lies_between_the_elements_must_stay(self):
        def beside(x, cache, slots):
            write_rows(x, cache, slots)
            cache.as_strided((9,), (8,), cache.storage_offset() + 1).zero_()

        report = judge(self.op, beside, Case())
        assert report.problems == {"written out of bounds"}
        assert "between or around the elements of cache" in str(report)


class TestInputs:
    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x,
            lambda x: x.t(),
            lambda x: x[1:, 2:5],
            lambda x: x[0].expand(3, 8),
            lambda x: x[:, :0],
            lambda x: x[2, 3],
        ],
        ids=["whole", "transposed", "sliced", "expanded", "empty", "scalar"],
    )
    def test_a_kernel_gets_the_strides_and_alignment_of_the_inputs(self, view):
        seen = []

        def kernel(x):
            seen.append((x.stride(), x.storage_offset() % 8))
            return x + 1

        assert judge(simple(lambda x: x + 1, view), kernel, Case()).ok
        original = view(torch.zeros(8, 8))
        offset = 0 if original.numel() == 0 else original.storage_offset() % 8
        assert seen == 3 * [(original.stride(), offset)]

    @pytest.mark.parametrize("in_place", [False, True])
    def test_a_weight_is_prepared_for_each_call_and_stays_what_it_was(self, in_place):
        given = []

        def prepare(weight):
            given.append(weight.clone())
            return weight.mul_(2) if in_place else 2 * weight

        halved = Implementation(lambda x, weight, eps: norm(x, weight / 2, eps), prepare=prepare)
        op = Op("norm", reference=rms_norm_reference, implementations={"halved": halved}, inputs=rms_norm.make_inputs)
        report = judge(op, "halved", ROWS)
        assert given[0].equal(given[1])
        assert report.problems == {"changed argument"} if in_place else report.ok and len(given) == 3

    def test_a_compiled_kernel_is_judged_compiled(self):
        compiled = []

        def wrong_compiler(graph, example_inputs):
            compiled.append(graph)
            return lambda *inputs: [x * 1.01 for x in graph(*inputs)]

        kernel = torch.compile(lambda x: x + 1, backend=wrong_compiler)
        assert judge(simple(lambda x: x + 1, lambda x: x), kernel, Case()).problems == {"wrong values"} and compiled

    def test_arguments_go_by_position(self):
        assert judge(NORM, lambda a, b, c: norm(a, b, c), ROWS).ok


def test_the_defaults_are_the_operators_cases_and_dtypes():
    op = Op(
        "norm",
        reference=rms_norm_reference,
        inputs=rms_norm.make_inputs,
        cases=(ROWS, Case(tokens=1, hidden=8)),
        large_cases=(Case(tokens=2, hidden=8),),
    )
    results = op.check(norm, device="cpu").results
    assert [result.case for result in results] == [op.cases[0], op.cases[0], op.cases[1], op.cases[1]]
    assert [result.dtype for result in results] == [HALF, SINGLE, HALF, SINGLE]


def test_a_name_that_is_none_and_one_that_cannot_run_are_refused(monkeypatch):
    op = Op(
        "norm",
        reference=rms_norm_reference,
        implementations={
            "elsewhere": Implementation(norm, lambda device: "it is for another machine"),
            "triton": Implementation(norm, needs_gpu),
        },
        inputs=rms_norm.make_inputs,
    )
    with pytest.raises(ValueError, match="operator norm has no implementation 'tritn'"):
        judge(op, "tritn", ROWS)
    with pytest.raises(ValueError, match="'elsewhere' cannot run on cpu: it is for another machine"):
        judge(op, "elsewhere", ROWS)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' cannot run on cpu: Triton compiles for a GPU"):
        judge(op, "triton", ROWS)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert judge(op, "triton", ROWS).ok
