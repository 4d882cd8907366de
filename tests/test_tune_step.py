"""bench.tune_step: a launch is changed where it is meant and nowhere else, and each has its steps."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from microvllm.bench import record, tune_step
from microvllm.bench.engines import Model, our_engine
from microvllm.bench.tune_step import AS_IT_IS, THE_LIBRARYS, Place, parse, rows, step_seconds
from microvllm.bench.workloads import Workload
from microvllm.kernels import linear

from .checkpoints import save_folder

DOWN = Place("linear", "_few_rows_launch", {"inputs": (18944,)})
WORKLOAD = Workload("2", 2, (3, 5), 8)


def launches() -> dict[str, dict | None]:
    """By the product: the launch for eight rows."""
    products = {"o": (3584, 3584), "down": (3584, 18944)}
    return {name: linear._few_rows_launch(8, *sizes, h200=False) for name, sizes in products.items()}


def test_a_launch_is_changed_where_it_is_meant():
    before = launches()
    with DOWN.choosing({"STAGES": 2}):
        assert launches() == {"o": before["o"], "down": {**before["down"], "STAGES": 2}}
    with DOWN.choosing(None):
        assert launches() == {"o": before["o"], "down": None}
    assert launches() == before


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_folder(folder, vocab_size=96)
    return our_engine(Model(str(folder), "auto", "float32", 128), max_batch_size=2)


def test_each_launch_is_captured_and_has_its_steps_in_turns(engine, monkeypatch, capsys):
    monkeypatch.setattr(tune_step, "STEPS", 3)
    captured = []

    def recapture(count):
        captured.append((count, launches()["down"]["STAGES"]))
        if captured[-1][1] == 9:
            raise ValueError("no room\nfor it")

    monkeypatch.setattr(engine.runner, "recapture", recapture, raising=False)
    tried = {AS_IT_IS: {}, "STAGES=2": {"STAGES": 2}, "STAGES=9": {"STAGES": 9}}
    taken = step_seconds(engine, WORKLOAD, 96, DOWN, tried)
    now = launches()["down"]["STAGES"]
    assert captured == [(2, now), (2, 2), (2, 9), (2, 2), (2, now), (2, now), (2, 2)]
    assert {name: len(steps) for name, steps in taken.items()} == {AS_IT_IS: 9, "STAGES=2": 9}
    assert all(second > 0 for second in itertools.chain(*taken.values()))
    assert capsys.readouterr().err == "STAGES=9: ValueError: no room\n"


def test_the_fastest_comes_first(monkeypatch):
    monkeypatch.setattr(tune_step, "STEPS", 2)
    found = rows({AS_IT_IS: [2e-3, 2e-3, 4e-3, 4e-3], "A=1": [1e-3, 1e-3, 1e-3, 1e-3]})
    assert [row["launch"] for row in found] == ["A=1", AS_IT_IS]
    assert found[0]["× as it is"] == "0.3333" and found[1]["turns"] == "2.000–4.000"


def test_the_command_line_says_what_is_tried():
    options = parse(["35", "linear._few_rows_launch", "A=1,2", "B=3", "--of", "inputs=18944", "--library"])
    assert options.place == DOWN and options.workload.requests == 35
    assert options.launches == {
        AS_IT_IS: {}, THE_LIBRARYS: None, "A=1 B=3": {"A": 1, "B": 3}, "A=2 B=3": {"A": 2, "B": 3}
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["34", "linear._few_rows_launch", "A=1"], "there is no case '34'"),
        (["35", "linear._launch", "A=1"], "has no attribute '_launch'"),
        (["35", "lines._launch", "A=1"], "No module named 'microvllm.kernels.lines'"),
        (["35", "linear._few_rows_launch", "A=x"], "'A=x' is not NAME=1"),
        (["35", "linear._few_rows_launch", "A=1", "--of", "columns=1"], "is not given 'columns'"),
        (["35", "linear._few_rows_launch"], "there is nothing to try"),
    ],
)
def test_a_wrong_word_is_named(arguments, words, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert words in capsys.readouterr().err


def test_it_wants_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no GPU"):
        tune_step.main(["35", "linear._few_rows_launch", "--library"])


def test_it_saves_what_it_found(engine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune_step, "our_engine", lambda model, **options: engine)
    monkeypatch.setattr(tune_step, "step_seconds", lambda *arguments: {AS_IT_IS: [2e-3], "A=1": [1e-3]})
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "A GPU")
    tune_step.main(["35", "linear._few_rows_launch", "A=1", "--of", "inputs=18944"])
    (path,) = tmp_path.glob("*/*.json")
    saved = json.loads(path.read_text())
    assert path.name == "tune-step-qwen2-7b-35-linear.json" and saved["of"] == {"inputs": [18944]}
    assert [row["launch"] for row in saved["rows"]] == ["A=1", AS_IT_IS]
