"""bench.engine --profile: traces and attribution on made-up kernels, and the whole of it on a small model."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from microvllm.bench import engine as bench
from microvllm.bench import engine_picture, profiler, record
from microvllm.bench.device_trace import (
    GAPS,
    MARK,
    OUTSIDE,
    UNKNOWN,
    Attribution,
    Event,
    labelled,
    sections,
    step_parts,
)
from microvllm.bench.engines import Model, our_engine
from microvllm.bench.operator_calls import SIZES, CallCosts, WatchedKernels, call_cost
from microvllm.bench.profile import Line, Profile, lines, middle_half, point, rows, words
from microvllm.bench.profiler import Blocks, Profiler
from microvllm.bench.steady_decode import HOST, SETTLED, HostClock, SteadyDecode
from microvllm.bench.workloads import Workload
from microvllm.kernels.kernel_set import OPS, KernelSet
from microvllm.kernels.op import Cost
from microvllm.kernels.roof import Roof

from .checkpoints import save_folder

VOCAB_SIZE = 96
LAYER = [("norm", "add_rms_norm"), ("gemm", "linear"), ("rope", "rotary_store_kv"), ("attend", "paged_attention")]
LAYER += [("merge", "paged_attention"), ("gemm", "linear"), ("norm", "add_rms_norm"), ("gemm", "linear")]
KNOWN = [("copy", OUTSIDE), ("gather", OUTSIDE), *LAYER * 4, ("gemm", "linear"), ("copy", OUTSIDE), ("argmax", OUTSIDE)]
NAMES = [name for name, _ in KNOWN]
LABELS = [text for _, text in KNOWN]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "small"
    save_folder(folder, max_position_embeddings=1024, eos_token_id=None)
    return str(folder)


@pytest.fixture(scope="module")
def model(folder):
    return Model.open(folder, "auto", "auto", 256)[0]


def in_a_row(names, start=0.0, seconds=1.0):
    """Kernels that each last `seconds`, one right behind the other."""
    return [Event(start + i * seconds, start + (i + 1) * seconds, name) for i, name in enumerate(names)]


class TestTrace:
    def test_cut_at_marks(self):
        before, *cut = in_a_row(["early", MARK, "a", "b", MARK, MARK, "c"])
        first, empty, last = sections([*reversed(cut), before], marks=3)
        assert (first.names, empty.names, last.names) == (("a", "b"), (), ("c",))
        assert [(s.start, s.end) for s in (first, empty, last)] == [(1, 4), (4, 5), (5, 7)]

    def test_a_mark_under_a_longer_name(self):
        assert len(sections(in_a_row([f"microvllm.{MARK}_0d"]), marks=1)) == 1

    @pytest.mark.parametrize("names", [[], ["a"], [MARK, "a"]])
    def test_missing_marks_are_an_error(self, names):
        with pytest.raises(RuntimeError, match=rf"has {names.count(MARK)} of the 2 marks"):
            sections(in_a_row(names), marks=2)

    def test_labels_are_those_of_the_marks(self):
        events = in_a_row([MARK, "copy", MARK, "gemm", "sum", MARK, MARK, "gemm"])
        found = labelled(events, [OUTSIDE, "linear", OUTSIDE, "norm_linear"])
        assert found == [("copy", OUTSIDE), ("gemm", "linear"), ("sum", "linear"), ("gemm", "norm_linear")]

    def test_time_in_which_kernels_overlap_counts_once_and_the_sum_is_the_step(self):
        """b starts while a runs, c within b, d after a pause, and a copy ends after the next mark."""
        events = [Event(0, 1, MARK), Event(1, 4, "a"), Event(3, 6, "b"), Event(4, 5, "c"), Event(8, 9, "d")]
        events += [Event(9, 13, "copy"), Event(11, 12, MARK)]
        step, _ = sections(events, marks=2)
        assert step.own_times() == [3, 2, 0, 1, 2]
        parts = step_parts(step, Attribution([(name, "x") for name in "abcd"]))
        assert parts == {
            ("x", "a"): 3,
            ("x", "b"): 2,
            ("x", "c"): 0,
            ("x", "d"): 1,
            (UNKNOWN, "copy"): 2,
            (GAPS, ""): 3,
        }
        assert sum(parts.values()) == step.end - step.start == 11


class TestAttribution:
    def test_the_same_kernels(self):
        assert Attribution(KNOWN)(NAMES) == LABELS

    def test_a_name_of_two_operators_goes_by_its_place(self):
        known = [("gemm", "norm_linear"), ("gemm", "linear"), ("act", "swiglu")] * 3
        assert Attribution(known)([name for name, _ in known]) == [text for _, text in known]

    @pytest.mark.parametrize("other", [["wide_gemm"], ["split_gemm", "reduce"]])
    def test_another_kernel_in_the_place_of_an_operators(self, other):
        """As where a library takes another kernel for the batch that a graph was captured for."""
        names, labels = [], []
        for name, text in KNOWN:
            names += other if name == "gemm" else [name]
            labels += [text] * (len(other) if name == "gemm" else 1)
        assert Attribution(KNOWN)(names) == labels

    def test_one_product_of_a_layer_changes(self):
        places = [i for i, (name, _) in enumerate(KNOWN) if name == "gemm"][1::3]
        assert Attribution(KNOWN)(["tall" if i in places else name for i, name in enumerate(NAMES)]) == LABELS

    def test_kernels_that_the_eager_step_lacks(self):
        """One more of an operator's own is told by its name; what nobody has seen is told by nothing."""
        names = [*NAMES[:7], "merge", *NAMES[7:], "advance"]
        assert Attribution(KNOWN)(names) == [*LABELS[:7], "paged_attention", *LABELS[7:], UNKNOWN]

    def test_kernels_that_only_the_eager_step_has(self):
        assert Attribution(KNOWN)(NAMES[2:-2]) == LABELS[2:-2]

    def test_what_stands_for_the_kernels_outside_is_outside(self):
        assert Attribution(KNOWN)(["fetch", *NAMES[2:]]) == [OUTSIDE, *LABELS[2:]]

    def test_a_place_between_two_operators_tells_nothing(self):
        known = [("a", "linear"), ("b", "swiglu"), ("c", "rms_norm")]
        assert Attribution(known)(["both", "c"]) == [UNKNOWN, "rms_norm"]


class TestCalls:
    @pytest.mark.parametrize("name", SIZES)
    def test_the_sizes_of_a_call_are_those_its_inputs_were_made_of(self, name):
        op, generator = OPS[name], torch.Generator().manual_seed(0)
        for case in op.cases:
            if {"padded", "shortest"} & case.sizes.keys():  # their costs are of other rows, and of a mean
                continue
            dtype = torch.float32 if torch.float32 in op.dtypes else op.dtypes[0]
            inputs = op.inputs(**case.sizes, dtype=dtype, device=torch.device("cpu"), generator=generator)
            assert call_cost(op, **inputs) == op.cost(**case.sizes, itemsize=dtype.itemsize), case

    def test_each_sequence_has_its_own_context(self):
        q, cache = torch.zeros(2, 4, 8), torch.zeros(3, 16, 2, 8)
        lengths, table = torch.tensor([5, 20], dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32)
        cost = call_cost(OPS["paged_attention"], q, cache, cache, table, lengths, 1.0)
        assert cost.read == (2 * 25 * 2 * 8 + 2 * 4 * 8) * 4

    def test_an_operator_whose_sizes_are_not_known(self):
        assert call_cost(OPS["prefill_attention"], "anything") is None

    def test_watched_kernels_compute_the_same(self):
        watched = WatchedKernels(KernelSet.default("cpu"))
        assert watched.kernels.names == KernelSet.default("cpu").names
        weight = torch.randn(24, 16)
        prepared = watched.kernels.prepare("linear", weight)
        x, costs = torch.randn(3, 16), CallCosts()
        unseen = watched.kernels.linear(x, prepared)
        watched.observer = costs
        assert torch.equal(watched.kernels.linear(x, prepared, bias=None), unseen)
        assert torch.allclose(unseen, x @ weight.T, atol=1e-5)
        assert costs.of == {"linear": [Cost((3 + 24) * 16 * 4, 3 * 24 * 4, 2 * 3 * 24 * 16)]}


class TestSteadyDecode:
    WORKLOAD = Workload("2", 2, (8, 12), 1)

    @staticmethod
    def started(model, workload, steps, **options):
        engine = our_engine(model, progress=False, **options)
        return SteadyDecode(engine, HostClock(engine), workload, VOCAB_SIZE, steps)

    @pytest.mark.parametrize("options", [{}, {"async_scheduling": True}])
    def test_eager_steps_between_change_nothing(self, model, options):
        steps = 6
        prompts = self.WORKLOAD.prompts(VOCAB_SIZE)
        expected = our_engine(model, progress=False).generate(prompts, max_tokens=SETTLED + steps, ignore_eos=True)
        decode = self.started(model, self.WORKLOAD, steps, **options)
        for _ in range(steps):
            decode.decode_eagerly()
            (parts,) = decode.run(1)
            assert list(parts) == list(HOST) and all(seconds >= 0 for seconds in parts.values())
        texts = [seq.output_ids for seq in decode.engine.scheduler.running]
        for text, output in zip(texts, expected, strict=True):
            assert text[: SETTLED + steps] == output.token_ids[: len(text)]
        decode.close()
        assert not decode.engine.has_work and decode.engine.stats().blocks_used == 0

    def test_what_is_not_steady_is_an_error(self, model):
        with pytest.raises(RuntimeError, match="a step decoded 1 of 2 requests"):
            self.started(model, self.WORKLOAD, 4, max_batch_size=1)


def parts_of(*values):
    return {(f"part {i}", ""): value for i, value in enumerate(values)}


class TestProfile:
    ROOF = Roof(read=1e12, copy=1e12, flops=1e15, launch=1e-6)

    def test_outliers_are_out_and_parts_add_up(self):
        steps = [parts_of(1.0, 2.0), parts_of(2.0, 2.0), parts_of(2.0, 4.0), parts_of(90.0, 1.0)]
        assert middle_half(steps) == parts_of(2.0, 3.0)

    def profile(self, host=10e-6):
        parts = {("linear", "k1"): 4e-6, ("linear", "k2"): 2e-6, ("swiglu", "k3"): 1e-6, ("new_operator", "k"): 1e-6}
        parts |= {(GAPS, ""): 1.5e-6, (OUTSIDE, "copy"): 0.4e-6, (UNKNOWN, "what"): 0.3e-6}
        costs = [
            {"linear": [Cost(read, 0)] * 2, "swiglu": [Cost(100, 100)], "new_operator": [None]}
            for read in (10**6, 2 * 10**6)
        ]
        host = dict.fromkeys(HOST, host / len(HOST))
        return Profile(Workload("3", 3, (8, 9), 1), lines(parts, costs, self.ROOF), host)

    def test_lines(self):
        profile = self.profile()
        assert [line.name for line in profile.lines] == ["linear", "swiglu", "new_operator", OUTSIDE, UNKNOWN, GAPS]
        linear, _, new, *_, gaps = profile.lines
        assert linear == Line("linear", pytest.approx(6e-6), 2, 3e6, pytest.approx(3e-6), {"k1": 4e-6, "k2": 2e-6})
        assert (new.calls, new.moved, new.floor) == (1, None, None)
        assert (gaps.calls, gaps.kernels) == (None, {})

    def test_rows(self):
        profile = self.profile()
        table = {row["part"]: row for row in rows(profile)}
        assert table["linear"]["% of roof"] == "50.0%" and table["linear"]["% of step"] == "60.0%"
        assert table["linear"]["MB"] == 3 and table["new_operator"]["MB"] == "–" == table["sum"]["MB"]
        assert table["sum"]["µs"] == pytest.approx(10.2)
        assert table["step without the profiler"]["µs"] == pytest.approx(10)
        assert record.table(rows(profile)).count("host: ") == len(HOST)

    def test_a_sum_that_is_not_the_step_is_said(self):
        assert words(self.profile()).splitlines() == [
            "the sum is 2.0% over the step", f"{OUTSIDE}: 0.40 µs copy", f"{UNKNOWN}: 0.30 µs what"
        ]  # fmt: skip
        assert words(self.profile(host=9e-6)).startswith("NOT A PROFILE OF THIS STEP: the sum is 13.3% over the step")

    def test_picture(self, tmp_path):
        pytest.importorskip("matplotlib")
        points = json.loads(json.dumps([point(self.profile())]))
        about = {"model": "m", "dtype": "float32", "device": "a GPU", "date": "today", "commit": "0123abc"}
        path = engine_picture.draw({"kind": "profile", "points": points, **about}, tmp_path / "profile.png")
        assert path.stat().st_size > 10_000
        device, host = engine_picture.profile_figure({"points": points}).axes
        assert sum(bar.get_width() for bar in device.patches) == pytest.approx(10.2e-3)
        assert sum(bar.get_width() for bar in host.patches) == pytest.approx(10e-3)


class FakeGPU:
    """Stands for Marks and trace: every operator has a kernel of its own name that takes a µs, and a step that really
    runs has the same ones, with a pause of 2 µs and a kernel that nobody knows.
    """

    def __init__(self):
        self.events, self.now, self.operators = [], 0.0, []

    def marks(self, device):
        return self

    def launch(self, name):
        self.events.append(Event(self.now, self.now + 1e-6, name))
        self.now += 1e-6

    @property
    def labels(self):
        return [OUTSIDE, *(text for op in self.operators for text in (op, OUTSIDE))]

    def put(self, text):
        self.launch(MARK)
        if text == "step":
            for op in self.operators:
                self.launch(f"{op}_kernel")
            self.now += 2e-6
            self.launch("books")

    def begins(self, op, args, kwargs):
        self.operators.append(op)
        self.launch(MARK)
        self.launch(f"{op}_kernel")

    def ends(self, op):
        self.launch(MARK)

    def trace(self, run):
        self.events = []
        run()
        return self.events


class TestProfiler:
    WORKLOAD = Workload("2", 2, (8, 12), 1, temperature=0.7)
    BLOCKS = Blocks(steps=4, rounds=2)

    def test_on_a_cpu(self, model):
        profile = Profiler(model).profile(self.WORKLOAD, VOCAB_SIZE, self.BLOCKS)
        found = {line.name: line for line in profile.lines}
        assert {name: line.calls for name, line in found.items() if line.calls} == {
            "linear": 9, "rms_norm": 5, "rotary_store_kv": 2, "paged_attention": 2, "swiglu": 2, "sample": 1,
            "advance_decode": 1,
        }  # fmt: skip
        assert all(line.seconds > 0 and line.floor is None for line in profile.lines)
        assert found["sample"].moved == 2 * VOCAB_SIZE * 4 + 2 * 8
        assert OUTSIDE in found and UNKNOWN not in found and GAPS not in found
        assert profile.sum == pytest.approx(profile.step, rel=0.5)  # steps of a millisecond beside other tests

    def test_with_other_kernels(self, model):
        seen = []

        def watched_swiglu(gate_up):
            seen.append(len(gate_up))
            return OPS["swiglu"].reference(gate_up)

        ours = Profiler(model, kernels=KernelSet.default().replace(swiglu=watched_swiglu))
        found = {line.name: line for line in ours.profile(self.WORKLOAD, VOCAB_SIZE, self.BLOCKS).lines}
        assert found["swiglu"].calls == 2 and seen.count(2) > 2 * self.BLOCKS.all_steps

    def test_its_parts_are_the_step(self, model):
        profiler = Profiler(model)
        decode = SteadyDecode(profiler.engine, profiler._clock, self.WORKLOAD, VOCAB_SIZE, 8)
        (host,) = decode.run(1)
        whole = []
        decode.run = lambda steps: whole.append(host) or [dict(host)]
        for parts in profiler._cpu_steps(decode, 3):
            assert sum(parts.values()) == pytest.approx(sum(host.values()))
        assert len(whole) == 3

    def test_on_a_gpu(self, model, monkeypatch):
        gpu = FakeGPU()
        monkeypatch.setattr(profiler, "Marks", gpu.marks)
        monkeypatch.setattr(profiler, "trace", gpu.trace)
        ours = Profiler(model, TestProfile.ROOF)
        ours.engine.device = torch.device("cuda")
        monkeypatch.setattr(ours.engine, "its_gpu", nullcontext)
        profile = ours.profile(self.WORKLOAD, VOCAB_SIZE, self.BLOCKS)
        found = {line.name: line for line in profile.lines}
        assert len(gpu.operators) == 22
        assert {name: round(line.seconds * 1e6) for name, line in found.items()} == {
            "linear": 9, "rms_norm": 5, "rotary_store_kv": 2, "paged_attention": 2, "swiglu": 2, "sample": 1,
            "advance_decode": 1, UNKNOWN: 1, GAPS: 3,
        }  # fmt: skip
        assert found[UNKNOWN].kernels == {"books": pytest.approx(1e-6)}
        assert profile.sum == pytest.approx(26e-6) and found["linear"].floor > 0


class TestCommand:
    def test_on_a_small_model(self, folder, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(record, "RESULTS", tmp_path)
        bench.main(["--model", folder, "--profile", "--quick", "--requests", "1", "2", "--rounds", "1"])
        path = next(tmp_path.glob("*/profile-small-quick.json"))
        saved = json.loads(path.read_text())
        assert (saved["kind"], saved["roof"], saved["blocks"]) == ("profile", None, {"steps": 4, "rounds": 1})
        assert [point["case"] for point in saved["points"]] == ["1", "2"]
        assert {row["part"] for row in saved["rows"]} >= {"linear", "sum", "host: schedule"}
        assert path.with_suffix(".png").exists()
        assert capsys.readouterr().out.count("the sum is ") == 2

    def test_on_a_gpu_it_is_qwen2_7bs_shape(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        options = bench.parse(["--profile"])
        assert (options.model, options.load_format) == (str(bench.SHAPES / "qwen2-7b"), "dummy")
        assert [(w.requests, w.prompt) for w in options.workloads] == [(1, (512, 512)), (35, (512, 512))]

    def test_it_takes_no_peer(self, capsys):
        with pytest.raises(SystemExit):
            bench.parse(["--profile", "--peer", "transformers"])
        assert "take no --peer" in capsys.readouterr().err
