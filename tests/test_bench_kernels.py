"""bench.kernels: what it measures beside what, what it says, its records and their pictures."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from microvllm.bench import kernels as bench
from microvllm.bench import record
from microvllm.bench.peers import PEERS
from microvllm.kernels.measurement import Row
from microvllm.kernels.op import Op

from .test_measure import OP, ROOF, made_up_gpu, peer, row, timing  # noqa: F401 — one is a fixture


def test_there_are_peers_for_operators_alone():
    assert set(PEERS) <= set(bench.OPERATORS)


@pytest.mark.parametrize("package", ["vllm", "flashinfer", "flash_attn"])
def test_what_is_not_installed_says_so(package, monkeypatch):
    monkeypatch.setattr("microvllm.bench.peers.find_spec", lambda name: None)
    words = {peer.unavailable() for peers in PEERS.values() for peer in peers}
    assert f"not installed ({package})" in words
    assert {peer.name for peers in PEERS.values() for peer in peers if peer.unavailable() is None} == {
        "cuBLAS",
        "cuBLAS, rms_norm",
        "cuBLAS, swiglu",
        "ours, any GPU",
        "torch.compile",
        "unfused",
    }


def test_the_summary_compares_with_the_fastest_peer_and_allows_for_the_spread():
    rows = [
        row(1, timing(10.0), a=timing(20.0), b=timing(25.0)),
        row(2, timing(21.0, 2.0), a=timing(20.0, 2.0)),
        row(3, timing(30.0, 1.0), a=timing(15.0, 1.0), b="not installed"),
        row(4, "failed: RuntimeError: no", a=timing(1.0)),
        row(5, timing(7.0)),
    ]
    (line,) = bench.summary("swiglu", rows)
    assert (line["cases"], line["slower"], line["worst"], line["worst at"]) == ("3", 1, 2.0, "tokens=3 (× a)")
    assert line["geometric mean"] == pytest.approx((0.5 * 1.05 * 2) ** (1 / 3))
    assert line["together"] == pytest.approx(61 / 55)


def test_a_failure_is_a_row_of_words(monkeypatch, capsys):
    def failing(*arguments, **options):
        raise RuntimeError("out of memory\nin the depths")

    monkeypatch.setattr(bench, "measure_case", failing)
    monkeypatch.setattr(bench, "measure_roof", lambda device: ROOF)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    failed = bench.measured(OP, "good", OP.large_cases[0], torch.float32, ())
    assert bench.in_short(failed) == "failed: RuntimeError: out of memory"
    assert "in the depths" in capsys.readouterr().err


@pytest.mark.usefixtures("made_up_gpu")
def test_a_benchmark_leaves_a_record_of_all_that_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    peers = (peer("a", microseconds=25.0), peer("b", unavailable=lambda: "not installed"))
    rows = bench.bench(OP, "good", torch.float32, peers)
    (path,) = tmp_path.glob("*/kernels-scaled.json")
    saved = json.loads(path.read_text())
    assert (saved["operator"], saved["kernel"], saved["dtype"], saved["roof"]) == (
        OP.name,
        "good",
        "float32",
        asdict(ROOF),
    )
    assert saved["not_measured"] == {"a": [], "b": ["not installed"]}
    assert saved["points"][1]["sizes"] == {"tokens": 300}
    assert saved["points"][1]["time"] == {"median": 10.0, "low": 10.0, "high": 10.0}
    assert saved["points"][1]["peers"] == {"a": {"median": 25.0, "low": 25.0, "high": 25.0}, "b": "not installed"}
    assert [line["× a"] for line in saved["rows"]] == [0.4, 0.4] and len(rows) == 2
    assert {"device", "versions", "commit", "command", "date"} <= saved.keys()
    assert "[2/2] scaled tokens=300: 10.00 µs, 0% of the roof, ×0.40 a" in capsys.readouterr().out


def made_up_record(op: Op) -> dict:
    """A record as `bench.kernels` saves it, of times that nobody measured: a case failed, a peer is absent."""
    rows = []
    for i, case in enumerate(op.large_cases):
        cost = op.cost(**case.sizes, itemsize=2)
        time = ROOF.time(cost) * 1e6 + 2
        peers = {"fast": timing(1.2 * time), "absent": "not installed", "picky": "no" if i % 3 else timing(2 * time)}
        rows.append(Row(case, torch.bfloat16, cost, ROOF, "failed: no" if i == 1 else timing(time, 0.1), peers))
    about = {"operator": op.name, "kernel": "triton", "dtype": "bfloat16", "roof": asdict(ROOF)}
    about |= {"device": "made up", "date": "2026-01-01", "commit": "none", "points": [row.record() for row in rows]}
    flat = [bench.flat(row, ["fast", "absent", "picky"]) for row in rows]
    assert all(line.keys() == flat[0].keys() for line in flat)
    return json.loads(json.dumps(about | {"rows": flat}))


@pytest.mark.parametrize("op", [op for op in bench.OPERATORS.values() if op.large_cases], ids=lambda op: op.name)
def test_a_record_is_drawn_without_a_gpu(op, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install micro-vllm[bench])")
    folder = tmp_path / "made-up"
    folder.mkdir()
    (folder / f"kernels-{op.name}.json").write_text(json.dumps(made_up_record(op)))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["bench.kernels", "--draw"])
    bench.main()
    picture = folder / f"kernels-{op.name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert str(picture) in capsys.readouterr().out


def test_panels_part_the_sizes_and_lone_points_share_one():
    from microvllm.kernels.measurement_picture import arrange

    def point(**sizes):
        return {"sizes": sizes}

    axis, lines = arrange(
        [
            *(point(batch=b, context=c, block_size=16) for b in (1, 8) for c in (512, 4096)),
            *(point(batch=b, context=c, block_size=256) for b, c in ((1, 512), (8, 4096))),
        ]
    )
    assert axis == "context"
    assert [[(title, len(points), joined) for title, points, joined in line] for line in lines] == [
        [("batch 1\nblock_size=16", 2, True), ("batch 8\nblock_size=16", 2, True)],
        [("block_size=256", 2, False)],
    ]
    axis, lines = arrange([point(rows=r, outputs=o) for o in (3, 4) for r in (1, 8)])
    assert axis == "rows" and [title for title, _, _ in lines[0]] == ["outputs=3", "outputs=4"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "words, message",
    [
        (["swiglu"], "timing needs a GPU"),
        (["swigluu"], "there is no 'swigluu'; there are: rms_norm"),
        (["--only", "cublas"], "there is no 'cublas'; there are: "),
        (["--kernel", "liner=triton"], "there is no 'liner'; there are: rms_norm"),
    ],
)
def test_the_command_says_what_it_cannot_do(words, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.kernels", *words])
    with pytest.raises(SystemExit) as exit:
        bench.main()
    assert exit.value.code == 2 and message in capsys.readouterr().err
