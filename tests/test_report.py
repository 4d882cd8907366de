"""What a check says: its verdict, as text, HTML, JSON and a picture, and the line that repeats a case."""

from __future__ import annotations

import json

import pytest
import torch
from microvllm.kernels import paged_attention, rms_norm
from microvllm.kernels.op import Case, Implementation, Op
from microvllm.kernels.origin import device_name
from microvllm.kernels.report import Report
from microvllm.kernels.rms_norm import rms_norm_reference

from .planted_kernels import ATTENTION, HALF, NORM, ROWS, SINGLE, TEXTS, error_raised, judge, nan_in_one_place, norm


class TestReport:
    def test_a_refused_case_is_no_pass_and_is_not_run(self):
        op = Op(
            "norm",
            reference=rms_norm_reference,
            implementations={
                "wide": Implementation(
                    norm, refuses=lambda x, weight, eps: "hidden is below 64" if x.shape[1] < 64 else None
                ),
                "none": Implementation(error_raised, refuses=lambda **inputs: "it takes nothing"),
            },
            inputs=rms_norm.make_inputs,
        )
        some = judge(op, "wide", ROWS, Case(tokens=1, hidden=8))
        assert some.ok and [result.verdict for result in some.results] == ["right", "refused: hidden is below 64"]
        assert "1 right, 0 wrong, 1 refused" in str(some)
        none = judge(op, "none", ROWS)
        assert not none.ok and none.problems == set()

    def test_no_case_is_no_pass(self):
        report = judge(NORM, norm)
        assert not report.ok and "0 right, 0 wrong, 0 refused" in str(report)
        assert not judge(NORM, norm, ROWS, dtypes=[]).ok

    def test_one_wrong_case_among_right_ones_is_seen(self):
        def wrong_for_one(x, weight, eps):
            return norm(x, weight, eps) * (1 if x.shape[0] != 5 else 1.01)

        report = judge(NORM, wrong_for_one, ROWS, Case(tokens=5, hidden=64), Case(tokens=6, hidden=64))
        assert not report.ok and [result.verdict for result in report.results] == ["right", "wrong values", "right"]

    def test_its_text_shows_a_table_and_where_a_kernel_is_wrong(self):
        report = judge(NORM, nan_in_one_place, ROWS, dtypes=[HALF, SINGLE])
        title, header, first, second, _, case, where, again, *_ = str(report).splitlines()
        assert title == "rms_norm, nan_in_one_place, on cpu: 0 right, 2 wrong, 0 refused"
        column = header.index("verdict")
        assert first[column:] == second[column:] == "NaN"
        assert case == "tokens=7 hidden=100, float16"
        assert where.startswith("  NaN: 1 of 700 elements of output, the first at [3, 14]: expected")
        assert again.startswith("  again: rms_norm.OP.check(nan_in_one_place, [Case(tokens=7, hidden=100)], ")

    def test_the_worst_place_is_shown_with_what_was_expected_there(self):
        def wrong_in_one_place(x, weight, eps):
            y = norm(x, weight, eps)
            y[5, 77] = 1000
            return y

        (problem,) = judge(NORM, wrong_in_one_place, ROWS).results[0].problems
        inputs = rms_norm.make_inputs(7, 100, dtype=HALF, device=None, generator=torch.Generator().manual_seed(0))
        truth = rms_norm_reference(inputs["x"].double(), inputs["weight"].double(), inputs["eps"])[5, 77]
        assert problem.where.startswith(f"output[5, 77]: expected {truth:.6g}, got 1000, error")
        assert "; 1 of 700 elements" in problem.where

    @pytest.mark.parametrize(
        "op, name",
        [(rms_norm.OP, "rms_norm.OP"), (rms_norm.ADD_OP, "rms_norm.ADD_OP"), (ATTENTION, "paged_attention.OP")],
    )
    def test_the_line_that_repeats_a_case_repeats_it(self, op, name):
        case = TEXTS if op is ATTENTION else ROWS
        report = judge(op, error_raised, case, dtypes=[SINGLE], seed=3)
        (line,) = (result.reproduce for result in report.results)
        assert line.startswith(f"{name}.check(error_raised, [{case!r}], dtypes=[torch.float32]") and "seed=3" in line
        names = {"rms_norm": rms_norm, "paged_attention": paged_attention, "error_raised": error_raised}
        assert str(eval(line, {**names, "Case": Case, "torch": torch})) == str(report)

    def test_in_a_notebook_with_all_text_escaped(self):
        html = judge(NORM, lambda *inputs: norm(*inputs) * 2, ROWS)._repr_html_()
        assert "rms_norm, kernel, on cpu: 0 right, 1 wrong" in html and "again: rms_norm.OP.check(kernel, [" in html
        html = Report("<script>", (), "cpu").table().html()
        assert "&lt;script&gt;" in html and "<script" not in html

    def test_as_json(self, tmp_path):
        report = judge(NORM, nan_in_one_place, ROWS, dtypes=[HALF, SINGLE])
        saved = json.loads(report.save(tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
        assert (saved["kind"], saved["ok"]) == ("check", False) and {"date", "device", "versions"} <= saved.keys()
        first, second = saved["results"]
        assert first["sizes"] == {"tokens": 7, "hidden": 100} and (first["dtype"], second["dtype"]) == (
            "float16",
            "float32",
        )
        assert (
            first["verdict"] == "NaN" and first["error"] is None and first["reproduce"].startswith("rms_norm.OP.check")
        )

    def test_a_check_on_the_cpu_is_saved_as_made_there_beside_a_gpu(self, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
        report = judge(NORM, norm, ROWS, dtypes=[HALF])
        saved = json.loads(report.save(tmp_path / "r.json").read_text())
        assert saved["device"] == report.device == device_name(torch.device("cpu")) != device_name() == "a GPU"

    def test_as_a_picture(self):
        wrong = judge(NORM, lambda *inputs: norm(*inputs) * 1.1, ROWS, dtypes=[HALF])
        right = judge(NORM, norm, ROWS, Case(tokens=0, hidden=8), dtypes=[HALF])
        broken = judge(NORM, nan_in_one_place, ROWS, dtypes=[HALF])
        (axes,) = Report("all", wrong.results + right.results + broken.results, "cpu").plot().axes
        widths = [bar.get_width() for bar in axes.patches]
        result = right.results[0]
        assert widths[0] > 1 > widths[1] == pytest.approx(result.error / result.allowed) and len(widths) == 3
        assert [text.get_text() for text in axes.texts] == [" NaN"]

    def test_a_seed_draws_the_same_inputs_again(self):
        first, same, other = (judge(NORM, norm, ROWS, seed=seed).results[0].error for seed in (1, 1, 2))
        assert first == same != other
