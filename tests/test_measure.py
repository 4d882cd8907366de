"""The timing of kernels, as far as it needs no GPU: the roof, the tables, what is refused, records and pictures.

Where a GPU would time, `FakeGraph` stands in: it makes the calls of a replay and says how long they took.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from microvllm.kernels import measure as module
from microvllm.kernels.measure import MeasurementError, Peer, measure, measure_case
from microvllm.kernels.measurement import Measurement, Row
from microvllm.kernels.op import Case, Cost, Implementation, Op
from microvllm.kernels.roof import Roof
from microvllm.kernels.timing import Clock, Timing, graph_time, take_turns

ROOF = Roof(read=4e12, copy=4e12, flops=800e12, launch=1e-6)
CPU = torch.device("cpu")


def timing(microseconds: float, spread: float = 0.0) -> Timing:
    return Timing(microseconds, microseconds - spread, microseconds + spread)


def row(tokens: int, time: Timing | str, **peers: Timing | str) -> Row:
    cost = Cost(read=tokens * 4_000_000, written=0, flops=0)
    return Row(Case(tokens=tokens), torch.bfloat16, cost, ROOF, time, peers)


class TestRoof:
    def test_a_copy_takes_as_long_as_its_reads_and_its_writes(self):
        roof = Roof(read=4.55e12, copy=4.30e12, flops=790e12, launch=1e-6)
        assert roof.time(Cost(read=10**9, written=10**9)) == pytest.approx(2e9 / 4.30e12)
        assert roof.time(Cost(read=10**9)) == pytest.approx(1e9 / 4.55e12)
        assert roof.write == pytest.approx(4.076e12, rel=1e-3)

    def test_the_slower_of_memory_and_arithmetic_counts(self):
        assert ROOF.time(Cost(read=4 * 10**6, flops=8 * 10**8)) == pytest.approx(1e-6)
        assert ROOF.time(Cost(read=4 * 10**6, flops=8 * 10**9)) == pytest.approx(1e-5)


class TestTiming:
    def test_it_is_the_median_and_the_outer_deciles(self):
        assert Timing.of([*range(101)]) == Timing(50, 10, 90)

    def test_graphs_are_replayed_in_turns_and_slow_ones_less_often(self):
        order = []

        def graph(name, microseconds):
            def replay(times):
                order.append((name, times))
                return [microseconds] * times

            return SimpleNamespace(calls=[None] * 100, replay=replay)

        fast, slow = take_turns([graph("fast", 10.0), graph("slow", 500.0)])
        assert (fast.median, slow.median) == (10.0, 500.0)
        assert order == [("fast", 1), ("slow", 1), *[("fast", 10), ("slow", 2)] * 5]


class TestRow:
    def test_it_is_a_share_of_the_roof_and_a_rate(self):
        one = row(10, timing(20.0))
        assert (one.share, one.over_launch) == (pytest.approx(0.5), pytest.approx(19.0))
        assert one.rate == (pytest.approx(2.0), "TB/s")
        product = replace(one, cost=Cost(read=1, flops=8 * 10**9))
        assert product.rate == (pytest.approx(400.0), "TFLOP/s")

    def test_a_ratio_is_our_time_over_the_peers(self):
        one = row(10, timing(20.0), slow=timing(40.0), fast=timing(16.0), absent="not installed")
        assert one.fastest == ("fast", timing(16.0))
        assert one.ratio(one.fastest[1]) == pytest.approx(1.25)
        assert row(10, timing(20.0), absent="not installed").fastest is None


def test_the_table_has_aligned_columns_and_says_what_was_not_timed():
    rows = (
        row(1, timing(2.5, 0.1), cuBLAS=timing(5.0), other="not installed (other)"),
        row(128, timing(250.0, 2.0), cuBLAS="failed: RuntimeError: no", other="not installed (other)"),
        row(4096, "failed: MeasurementError: wrong"),
    )
    assert str(Measurement("linear", "skinny", rows, "d")).splitlines() == [
        "linear: skinny",
        "  case         dtype       µs    10–90 %  over empty       rate  % of roof      cuBLAS  other",
        "  tokens=1     bfloat16  2.50  2.40–2.60        1.50  1.60 TB/s       40.0  5.00 ×0.50      –",
        "  tokens=128   bfloat16   250    248–252         249  2.05 TB/s       51.2           –      –",
        "  tokens=4096  bfloat16     –          –           –          –          –           –      –",
        "  other: not installed (other)",
        "  cuBLAS: failed: RuntimeError: no",
        "  tokens=4096: failed: MeasurementError: wrong",
        "  clock of the multiprocessors: not known (nvidia-ml-py is missing, or cannot read it)",
    ]


# A case from beginning to end, on a GPU that is made up.


def scaled_reference(x: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """y = x · weight, and total = Σ y in place."""
    y = x * weight
    total.copy_(y.sum(dim=-1))
    return y


def scaled_inputs(tokens, *, dtype, device, generator):
    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    fused = torch.full((tokens, 24), torch.nan, dtype=dtype, device=device)
    fused[:, :16] = normal(tokens, 16)
    return {"weight": 1 + normal(16) / 4, "x": fused[:, :16], "total": normal(tokens)}


def scaled_cost(tokens, itemsize):
    return Cost(read=tokens * 16 * itemsize, written=tokens * 16 * itemsize)


OP = Op(
    "scaled",
    reference=scaled_reference,
    implementations={
        "good": Implementation(scaled_reference),
        "halves": Implementation(
            lambda x, weight, total: scaled_reference(x, 2 * weight, total), prepare=lambda weight: weight / 2
        ),
        "picky": Implementation(scaled_reference, refuses=lambda **inputs: "takes no such case"),
        "elsewhere": Implementation(scaled_reference, lambda device: "it is for another machine"),
    },
    inputs=scaled_inputs,
    cost=scaled_cost,
    large_cases=(Case(tokens=1), Case(tokens=300)),
    dtypes=(torch.float32,),
    mutates=("total",),
)


def test_a_record_has_what_was_checked_before_it_was_timed():
    checked = replace(row(1, timing(2.5)), error=0.25, allowed=0.5).record()
    assert (checked["error"], checked["allowed"]) == (0.25, 0.5)
    refused = row(1, "refused: no").record()
    assert (refused["error"], refused["allowed"]) == (None, None)


class TestClock:
    def test_it_is_read_after_each_round_and_shown(self, monkeypatch):
        read = iter([1980, 1755, 1900, 1980, 1980])
        monkeypatch.setattr(torch.cuda, "clock_rate", lambda device: next(read))
        clock = Clock(CPU)
        graph = SimpleNamespace(calls=[None], replay=lambda times: [10.0] * times)
        take_turns([graph], after_round=clock.read)
        assert clock.range == (1755, 1980)
        measurement = Measurement("linear", "skinny", (replace(row(1, timing(2.5)), clock=clock.range),), "d")
        assert str(measurement).splitlines()[-1] == "  clock of the multiprocessors: 1755 to 1980 MHz"
        assert measurement.record()["points"][0]["clock"] == (1755, 1980)

    @pytest.mark.parametrize("error", [ModuleNotFoundError, RuntimeError, type("NVMLError", (Exception,), {})])
    def test_where_it_cannot_be_read_it_is_not_known(self, monkeypatch, error):
        def unreadable(device):
            raise error

        monkeypatch.setattr(torch.cuda, "clock_rate", unreadable)
        clock = Clock(CPU)
        clock.read()
        assert clock.range is None


class TestShown:
    rows = (row(1, timing(2.5, 0.1), a=timing(5.0), b="not installed"), row(8, "failed: <no>"), row(64, timing(30.0)))
    measurement = Measurement("swiglu", "<lambda>", rows, "a GPU")

    def test_in_a_notebook_with_all_text_escaped(self):
        html = self.measurement._repr_html_()
        assert html.count("<tr") == 4 and "failed: &lt;no&gt;" in html and "<lambda>" not in html

    def test_as_json(self, tmp_path):
        saved = json.loads(self.measurement.save(tmp_path / "m.json").read_text())
        assert (saved["kind"], saved["operator"], saved["kernel"]) == ("measurement", "swiglu", "<lambda>")
        assert [point["time"] for point in saved["points"]][1] == "failed: <no>" and saved["device"] == "a GPU"

    def test_as_a_picture(self, monkeypatch):
        (axes,) = self.measurement.plot().axes
        assert [y for line in axes.lines for y in line.get_ydata() if y == 2.5]
        with pytest.raises(ValueError, match="nothing was measured"):
            Measurement("swiglu", "triton", (), "a GPU").plot()
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ModuleNotFoundError, match=r"a plot needs matplotlib: pip install micro-vllm\[bench\]"):
            self.measurement.plot()


class FakeGraph:
    """Made of calls, as `CapturedCalls`: a replay makes them, keeps what they return, and takes `microseconds` each."""

    microseconds = 10.0

    def __init__(self, calls):
        self.calls = calls
        self.graph = self
        self.outputs = [call() for call in calls]
        self.made = [call.microseconds if hasattr(call, "microseconds") else self.microseconds for call in calls]

    def replay(self, times=1):
        for _ in range(times + 1):
            for kept, call in zip(self.outputs, self.calls, strict=True):
                kept.copy_(call())
        return self.made[:1] * times


@pytest.fixture
def made_up_gpu(monkeypatch):
    monkeypatch.setattr(module, "gpu", lambda device: CPU)
    monkeypatch.setattr(module, "measure_roof", lambda device: ROOF)
    monkeypatch.setattr(module, "CapturedCalls", FakeGraph)
    monkeypatch.setattr(module, "count_sets", lambda *arguments: 3)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda device: 1980)


def peer(name, function=scaled_reference, microseconds=20.0, **options):
    def bind(x, weight, total):
        def run():
            return function(x, weight, total)

        run.microseconds = microseconds
        return run

    return Peer(name, bind, **options)


@pytest.mark.usefixtures("made_up_gpu")
class TestMeasure:
    def one(self, kernel="good", *peers, case=Case(tokens=3)) -> Row:  # noqa: B008  a Case cannot change
        return measure_case(OP, kernel, case, peers=peers)

    def test_a_measurement_has_a_row_for_each_large_case(self):
        measurement = OP.measure("good")
        assert [str(row.case) for row in measurement.rows] == ["tokens=1", "tokens=300"]
        assert all(row.timing == timing(10.0) and row.dtype == torch.float32 for row in measurement.rows)
        assert str(measurement).startswith("scaled: good\n  case        dtype      µs")

    @pytest.mark.parametrize("kernel", ["good", "halves", scaled_reference])
    def test_implementations_and_callables_are_timed_with_their_weights_prepared(self, kernel):
        assert self.one(kernel).timing == timing(10.0)

    def test_what_refuses_a_case_is_not_timed(self):
        assert self.one("picky").timing == "refused: takes no such case"

    def test_a_wrong_kernel_is_not_timed(self):
        with pytest.raises(MeasurementError, match=r"wrong, so it was not timed(.|\n)*wrong values"):
            self.one(lambda x, weight, total: scaled_reference(x, 1.1 * weight, total))

    @pytest.mark.parametrize("fault, words", [("values", "wrong values"), ("nothing", "NaN")])
    def test_a_kernel_that_is_wrong_in_the_graph_is_found_out(self, monkeypatch, fault, words):
        class Skipping(FakeGraph):
            """Replays as a graph that has lost a pointer."""

            def replay(self, times=1):
                if fault == "values":
                    for kept in self.outputs:
                        kept.fill_(3.0)
                return self.made[:1] * times

        monkeypatch.setattr(module, "CapturedCalls", Skipping)
        with pytest.raises(MeasurementError, match=f"what was timed is wrong: {words}"):
            self.one()

    @pytest.mark.parametrize("cheat", ["the call before", "the first inputs", "the reference's output"])
    def test_a_graph_that_only_copies_a_result_is_found_out(self, monkeypatch, cheat):
        """Right in every check, and in the graph for the inputs that it was captured with."""

        class Copying(FakeGraph):
            def __init__(self, calls):
                super().__init__(calls)
                self.known = [y.clone() for y in self.outputs]

            def replay(self, times=1):
                super().replay(times)
                for i, y in enumerate(self.outputs):
                    if cheat == "the call before" and i > 0:
                        y.copy_(self.outputs[i - 1])
                    elif cheat != "the call before":
                        y.copy_(self.known[i])
                return self.made[:1] * times

        monkeypatch.setattr(module, "CapturedCalls", Copying)
        with pytest.raises(MeasurementError, match="what was timed is wrong for other inputs: wrong values"):
            self.one()

    def test_calls_that_return_one_piece_of_memory_are_found_out(self, monkeypatch):
        class Shared(FakeGraph):
            def __init__(self, calls):
                super().__init__(calls)
                self.outputs[2] = self.outputs[1]

        monkeypatch.setattr(module, "CapturedCalls", Shared)
        with pytest.raises(MeasurementError, match="call 2 of the timed graph returned what call 1 did"):
            self.one()

    def test_calls_of_a_graph_must_agree(self, monkeypatch):
        class Disagreeing(FakeGraph):
            def replay(self, times=1):
                super().replay(times)
                self.outputs[2] += 1e-6
                return self.made[:1] * times

        monkeypatch.setattr(module, "CapturedCalls", Disagreeing)
        with pytest.raises(MeasurementError, match="call 2 of the timed graph gave another output than call 0"):
            self.one()

    def test_a_time_that_cannot_be_is_refused(self, monkeypatch):
        case = Case(tokens=10_000)
        floor = ROOF.time(OP.cost(**case.sizes, itemsize=4)) * 1e6
        monkeypatch.setattr(FakeGraph, "microseconds", 0.98 * floor)
        assert self.one(case=case).share == pytest.approx(1 / 0.98)
        monkeypatch.setattr(FakeGraph, "microseconds", 0.96 * floor)
        with pytest.raises(MeasurementError, match=r"impossible: 0.31 µs, and this GPU needs 0.32 µs"):
            self.one(case=case)

    def test_of_peers_with_one_name_the_fastest_is_shown(self):
        row = self.one("good", peer("a", microseconds=30.0), peer("a", microseconds=25.0), peer("b"))
        assert row.peers == {"a": timing(25.0), "b": timing(20.0)}

    def test_an_implementation_can_be_a_peer(self):
        row = self.one("halves", "good", "picky", "elsewhere")
        words = {"picky": "takes no such case", "elsewhere": "it is for another machine"}
        assert row.peers == {"good": timing(10.0), **words}

    def test_a_peer_that_cannot_take_part_says_why_and_ours_is_timed(self):
        def failing(x, weight, total):
            raise RuntimeError("no such kernel\nand more")

        row = self.one(
            "good",
            peer("absent", unavailable=lambda: "not installed"),
            peer("other", lambda x, weight, total: scaled_reference(x, 2 * weight, total)),
            peer("idle", lambda x, weight, total: x * weight),
            peer("short", lambda x, weight, total: scaled_reference(x, weight, total)[:2]),
            peer("failing", failing),
            peer("hasty", microseconds=1e-9),
        )
        assert row.timing == timing(10.0)
        assert row.peers["absent"] == "not installed"
        assert row.peers["other"].startswith("wrong: output is 1 of its root mean square")
        assert row.peers["idle"].startswith("wrong: total is")
        assert row.peers["short"] == "wrong: output is [2, 16], and the reference's [3, 16]"
        assert row.peers["failing"] == "failed: RuntimeError: no such kernel"
        assert row.peers["hasty"].startswith("impossible: 0.00 µs")

    def test_a_peer_may_compute_in_place_on_copies(self):
        def bind(x, weight, total):
            x = x.clone()

            def run():
                total.copy_(x.mul_(weight).sum(dim=-1))
                return x

            return run

        assert self.one("good", Peer("p", bind, in_place=True)).peers == {"p": timing(10.0)}
        assert self.one("good", Peer("p", bind)).peers["p"].startswith("wrong: ")

    def test_a_misspelt_name_and_a_dtype_it_does_not_compute_in_are_refused(self):
        with pytest.raises(ValueError, match="operator scaled has no implementation 'goode'"):
            self.one("goode")
        with pytest.raises(ValueError, match="scaled computes in float32, not in float16"):
            measure(OP, "good", dtype=torch.float16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_timed():
    for device in (None, "cpu", "cuda"):
        with pytest.raises(ValueError, match="timing needs a GPU"):
            measure(OP, "good", device=device)
    with pytest.raises(ValueError, match="timing needs a GPU"):
        graph_time([lambda: None])
