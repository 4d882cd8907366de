"""`micro-vllm kernels`: what it prints, its exit codes, and its report."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from microvllm.engine.cli import main
from microvllm.engine.lab import cli
from microvllm.engine.lab import page as lab_page
from microvllm.kernels.measure import MeasurementError
from microvllm.kernels.op import REFERENCE, Implementation
from microvllm.kernels.origin import device_name, origin

from .small_engine import save_tokenizer
from .small_models import Shape, make_model

KERNELS = """
import torch
import triton
import triton.language as tl

FLOAT = 3.0

@triton.jit
def _scale(x_ptr, y_ptr, size, factor, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < size)
    tl.store(y_ptr + place, x + tl.sum(x * 0, 0) + factor * 0, mask=place < size)

def good(x, weight, eps):
    y = torch.nn.functional.rms_norm(x, weight.shape, weight, eps).contiguous()
    out = torch.empty_like(y)
    if y.numel():
        _scale[(triton.cdiv(y.numel(), 128),)](y, out, y.numel(), 1, BLOCK=128)
    return out

def bad(x, weight, eps):
    return good(x, weight, eps) * 1.1
"""
CASE = ["--case", "tokens=3", "hidden=40"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "mine.py"
    path.write_text(KERNELS)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(Shape(), folder)
    save_tokenizer(folder)
    return str(folder)


class Page(HTMLParser):
    """What a page fetches, and its text."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.words, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        names = dict(attributes)
        self.fetched += [names[key] for key in ("src", "href", "xlink:href") if not names.get(key, "#").startswith("#")]

    def handle_data(self, data):
        self.words.append(data)


def test_list_says_what_runs_here_and_why_not_the_others(capsys):
    assert main(["kernels", "list", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    lines = dict(line.strip().split(maxsplit=1) for line in out.splitlines()[1:])
    assert out.startswith("on cpu;") and set(lines) == set(cli.OPERATORS)
    assert lines["linear"] == "onednn        skinny: Triton compiles for a GPU; reference: available"
    assert lines["prefill_attention"] == (
        "reference     flash_attn: flash-attn needs a CUDA GPU; triton: Triton compiles for a GPU"
    )
    assert lines["add_rms_norm"].endswith("(no engine runs it)")


def test_list_says_what_can_be_measured_here_though_no_engine_can_run_it(monkeypatch, capsys):
    op = cli.OPERATORS["append_attention"]
    here = {"flash_attn": replace(op.implementations["flash_attn"], unavailable=lambda device: None)}
    own = {"own": Implementation(print)}
    monkeypatch.setattr(cli, "OPERATORS", {op.name: replace(op, implementations=here | own)})
    assert main(["kernels", "list", "--device", "cpu"]) == 0
    line = capsys.readouterr().out.splitlines()[1].split(maxsplit=2)
    assert line[1] == "own" and re.match(
        "flash_attn: for no engine: .* pads its batches .*; reference: available", line[2]
    )


class TestCheck:
    def test_a_right_kernel_and_a_wrong_one(self, file, capsys):
        words = ["kernels", "check", f"{file}:good", "--op", "rms_norm", *CASE, "--dtype", "float32", "--device", "cpu"]
        assert main(words) == 0
        assert "rms_norm, good, on cpu: 1 right, 0 wrong, 0 refused" in capsys.readouterr().out
        assert main([word.replace(":good", ":bad") for word in words]) == 1
        out = capsys.readouterr().out
        assert (
            "tokens=3 hidden=40  float32" in out and "again: rms_norm.OP.check(bad, [Case(tokens=3, hidden=40)]" in out
        )

    def test_an_implementation_by_its_name(self):
        assert main(["kernels", "check", REFERENCE, "--op", "rms_norm", *CASE, "--device", "cpu"]) == 0

    @no_gpu
    def test_the_interpreter_is_turned_on_before_triton_is_imported(self, file):
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        words = [sys.executable, "-m", "microvllm.engine.cli", "kernels", "check", f"{file}:good", "--op", "rms_norm"]
        done = subprocess.run([*words, *CASE], capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and "2 right, 0 wrong" in done.stdout
        assert done.stderr == "no GPU here: Triton's interpreter runs what is written in Triton (TRITON_INTERPRET=1)\n"

    @no_gpu
    def test_what_lies_in_the_current_folder_is_in_nobodys_way(self, file, tmp_path):
        for name in ("triton.py", "random.py"):
            (tmp_path / name).write_text("raise SystemExit(7)")
        (tmp_path / "beside.py").write_text("from helper import good")
        (tmp_path / "helper.py").write_text(KERNELS)
        for environment in ({}, {"TRITON_INTERPRET": "1"}):
            kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
            words = [Path(sys.executable).with_name("micro-vllm"), "kernels", "check", "beside.py:good"]
            words += ["--op", "rms_norm", *CASE]
            done = subprocess.run(words, capture_output=True, text=True, env=kept, cwd=tmp_path)
            assert done.returncode == 0 and "2 right, 0 wrong" in done.stdout, done.stderr

    @pytest.mark.parametrize("place", ["", "nowhere/r.html"])
    def test_a_report_that_cannot_be_written_is_refused_before_the_work(self, file, tmp_path, capsys, place):
        words = ["kernels", "check", f"{file}:bad", "--op", "rms_norm", *CASE, "--html", str(tmp_path / place)]
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2 and "is no file that can be written" in capsys.readouterr().err

    def test_a_report(self, file, tmp_path, monkeypatch):
        monkeypatch.setattr(lab_page, "origin", lambda: {**origin(), "device": "the GPU beside it"})
        path = tmp_path / "r.html"
        words = ["kernels", "check", f"{file}:bad", "--op", "rms_norm", *CASE, "--device", "cpu", "--html", str(path)]
        assert main(words) == 1
        text = path.read_text()
        page = Page(text)
        assert page.fetched == [] and "script" not in page.tags and page.tags.count("svg") == 1
        assert not re.search(r"url\((?!#)|@import", text)
        shown = "".join(page.words)
        verdict = shown.index("bad: rms_norm, bad, on cpu: 0 right, 2 wrong")
        assert verdict < shown.index("date") < shown.index("again: rms_norm.OP.check")
        assert f"torch {torch.__version__.partition('+')[0]}" in shown and "commit" in shown
        assert device_name(torch.device("cpu")) in shown and "the GPU beside it" not in shown


@pytest.mark.parametrize(
    "words, message",
    [
        (["check", "triton", "--op", "norm"], "there is no operator 'norm'; there are: rms_norm, linear"),
        (["check", "tritn", "--op", "rms_norm", "--device", "cpu"], "operator rms_norm has no implementation 'tritn'"),
        (["check", "nowhere.py:f", "--op", "rms_norm"], "there is no file nowhere.py"),
        (["check", "{file}:f", "--op", "rms_norm"], "has no function 'f'; it has: "),
        (["check", "{file}:FLOAT", "--op", "rms_norm"], "has no function 'FLOAT'"),
        (["check", "{file}", "--op", "rms_norm"], "names no function"),
        (
            ["check", "reference", "--op", "rms_norm", "--case", "rows=3"],
            "--case rows=3 must read SIZE=VALUE; the sizes of ",
        ),
        (["check", "reference", "--op", "rms_norm", "--case", "tokens=3"], "--case tokens=3 lacks hidden"),
        (
            ["check", "reference", "--op", "rms_norm", "--case", "tokens=-3", "hidden=8"],
            "--case tokens=-3: tokens must be an integer of at least 0",
        ),
        (
            ["check", "reference", "--op", "rms_norm", "--case", f"tokens={10**7}", f"hidden={10**7}"],
            "rms_norm cannot be checked with tokens=10000000 hidden=10000000 in float16: ",
        ),
        (
            ["check", "reference", "--op", "rms_norm", "--case", f"tokens={10**30}", "hidden=8"],
            f"rms_norm cannot be checked with tokens={10**30} hidden=8 in float16: ",
        ),
        (["compare"], "compare needs at least one --kernel"),
        (["compare", "--kernel", "rms_norm"], "--kernel rms_norm must read OP=NAME or OP=FILE.py:FUNCTION"),
        (["compare", "--kernel", "norm=triton"], "there is no operator 'norm'"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(file, words, message, capsys):
    assert main(["kernels", *(word.format(file=file) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("micro-vllm: ") and error.count("\n") == 1


def test_a_file_that_fails_to_import_says_how(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("1 / 0")
    assert main(["kernels", "check", f"{path}:f", "--op", "rms_norm"]) == 2
    assert "broken.py cannot be imported: ZeroDivisionError: division by zero" in capsys.readouterr().err


class TestBench:
    @no_gpu
    def test_it_needs_a_gpu(self, file, capsys):
        assert main(["kernels", "bench", f"{file}:good", "--op", "rms_norm"]) == 2
        assert capsys.readouterr().err == "micro-vllm: timing needs a GPU, and PyTorch sees none here\n"

    def test_a_wrong_kernel_is_exit_code_1(self, monkeypatch, capsys):
        def wrong(*arguments):
            raise MeasurementError("wrong, so it was not timed")

        monkeypatch.setattr(cli, "_measured", wrong)
        assert main(["kernels", "bench", "triton", "--op", "rms_norm"]) == 1
        assert capsys.readouterr().err == "micro-vllm: wrong, so it was not timed\n"


class TestCompare:
    def run(self, model, *words):
        small = ["--model", model, "--device", "cpu", "--max-tokens", "6", "--turns", "2", "--prompt", "hello there"]
        return main(["kernels", "compare", *small, *words])

    def test_a_right_kernel_and_its_check_in_one_report(self, model, file, tmp_path, capsys):
        path = tmp_path / "r.html"
        assert self.run(model, "--kernel", f"rms_norm={file}:good", "--with", "check", "--html", str(path)) == 0
        out = capsys.readouterr().out
        assert "b is as right as a" in out and "rms_norm: reference → good" in out and "0 wrong, 0 refused" in out
        page = Page(path.read_text())
        assert page.fetched == [] and page.tags.count("svg") == 2 and page.tags.count("h2") == 2
        assert "".join(page.words).index("good: ") < "".join(page.words).index("comparison")

    def test_its_kernels_are_timed_on_the_device_asked_for(self, model, file, monkeypatch):
        devices = []

        def measured(*arguments):
            devices.append(arguments[-1])
            raise MeasurementError("there is no time")

        monkeypatch.setattr(cli, "_measured", measured)
        assert self.run(model, "--kernel", f"rms_norm={file}:good", "--with", "bench") == 1
        assert devices == [torch.device("cpu")]

    def test_a_wrong_kernel_is_exit_code_1(self, model, file, capsys):
        assert self.run(model, "--kernel", f"rms_norm={file}:bad") == 1
        assert "b's logits are off by" in capsys.readouterr().out

    def test_an_implementation_by_its_name(self, model, capsys):
        assert self.run(model, "--kernel", "linear=reference") == 0
        assert "linear: onednn → reference" in capsys.readouterr().out


def test_a_function_of_a_file_runs_in_generate_too(model, file, capsys):
    words = ["generate", "--model", model, "--max-tokens", "3", "--device", "cpu", "hello"]
    assert main([*words, "--kernel", f"rms_norm={file}:good"]) == 0
    assert "good: rms_norm" in capsys.readouterr().err
