"""bench.engine: its arithmetic on engines that keep a clock of their own, and the whole of it on a small model."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from statistics import mean
from types import ModuleType, SimpleNamespace

import pytest
import torch
from microvllm.bench import engine as bench
from microvllm.bench import engine_picture, engines, gap, picture, policies, record, startup
from microvllm.bench.engine_tables import brief_rows, decode_rows, point, prefill_rows
from microvllm.bench.engines import OURS, VLLM, Model, our_engine
from microvllm.bench.floor import step_floor
from microvllm.bench.turns import Comparison, Turn, compare, measure
from microvllm.bench.workloads import DECODE, WORKLOADS, Workload, named

from .checkpoints import save_folder

SHAPES = Path(bench.__file__).parent / "shapes"
VOCAB_SIZE = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two small layers, long enough for the list's shorter cases."""
    folder = tmp_path_factory.mktemp("model") / "small"
    save_folder(folder, max_position_embeddings=1024, eos_token_id=None)
    return str(folder)


@pytest.fixture(scope="module")
def model(folder):
    return Model.open(folder, "auto", "auto", 256)[0]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Where records go."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setenv("MICROVLLM_COMMIT", "0123abc")
    return lambda name: json.loads(next(tmp_path.glob(f"*/{name}.json")).read_text())


class FakeEngine:
    """Takes `prefill` seconds, and `step` for each further token; `log` is shared by engines."""

    def __init__(self, name: str, prefill: float, step: float, log: list):
        self.name, self.prefill, self.step, self.log = name, prefill, step, log

    def seconds(self, prompts, tokens, sampling):
        self.log.append((self.name, len(prompts), tokens, sampling))
        return self.prefill + self.step * (tokens - 1)


class FakeVLLM(ModuleType):
    """What of vLLM the benchmark calls; `missing` tokens are left out of each answer."""

    def __init__(self, missing: int = 0):
        super().__init__("vllm")
        self.__spec__ = ModuleSpec("vllm", None)
        self.SamplingParams = lambda **params: params
        self.loads: list[dict] = []
        self.calls: list[tuple] = []

        def generate(prompts, params, use_tqdm):
            self.calls.append((prompts, params, use_tqdm))
            tokens = [0] * (params["max_tokens"] - missing)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)]) for _ in prompts]

        def load(**options):
            self.loads.append(options)
            return SimpleNamespace(generate=generate)

        self.LLM = load


@pytest.fixture
def vllm(monkeypatch):
    module = FakeVLLM()
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


class TestWorkloads:
    def test_prompts_are_the_same_each_time_and_within_bounds(self):
        workload = WORKLOADS["35"]
        prompts = workload.prompts(1000)
        assert prompts == workload.prompts(1000)
        assert len(prompts) == 35 and {len(p) for p in prompts} <= set(range(128, 513))
        assert len({len(p) for p in prompts}) > 20
        assert all(0 <= token < 1000 for p in prompts for token in p)

    def test_the_list(self):
        assert [(w.requests, w.tokens) for w in DECODE] == [
            (1, 500), (1, 500), (8, 500), (35, 500), (35, 500), (128, 500), (256, 300), (256, 512)
        ]  # fmt: skip
        assert WORKLOADS["1-sampled"].sampling == {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
        assert WORKLOADS["256-long"].sampling == {"temperature": 0.6}
        assert WORKLOADS["35"].sampling == {}

    def test_a_workload_in_words(self):
        assert str(WORKLOADS["1"]) == "128 / 500"
        assert str(WORKLOADS["35-sampled"]) == "128–512 / 500, temperature 0.7, top-k 50, top-p 0.9"
        assert str(WORKLOADS["prefill-4096"]) == "4096"

    def test_names(self):
        assert named([]) == list(WORKLOADS.values())
        assert named(["35", "1"]) == [WORKLOADS["35"], WORKLOADS["1"]]
        with pytest.raises(ValueError, match=r"there is no case '2'; there are: 1, 1-sampled, 8"):
            named(["1", "2"])


class TestTurns:
    def test_prefill_and_steps_apart(self):
        turn = measure(FakeEngine("x", 0.5, 0.01, []), [[1, 2]] * 4, 51, {})
        assert (turn.prefill, turn.step, turn.rate) == (0.5, pytest.approx(0.01), 4 * 51 / (0.5 + 0.5))

    def test_prefill_alone_counts_the_prompts_tokens(self):
        assert measure(FakeEngine("x", 0.5, 0.01, []), [[1, 2]] * 4, 1, {}) == Turn(0.5, None, 16.0)

    def test_engines_take_turns_after_a_warm_up(self):
        log = []
        workload = Workload("w", 3, (4, 4), 50, temperature=0.5)
        comparison = compare({n: FakeEngine(n, 1.0, 0.1, log) for n in "AB"}, workload, 100, rounds=2)
        assert [entry[0] for entry in log] == list("AABB" + "AABBAABB")
        assert [entry[2] for entry in log] == [1, 8] * 2 + [1, 50] * 4
        assert all(entry[1] == 3 and entry[3] == {"temperature": 0.5} for entry in log)
        assert {name: len(turns) for name, turns in comparison.turns.items()} == {"A": 2, "B": 2}

    def test_medians_spreads_and_gains(self):
        turns = {
            OURS: [Turn(1.0, 0.010, 90.0), Turn(3.0, 0.012, 100.0), Turn(2.0, 0.011, 130.0)],
            "vllm": [Turn(4.0, 0.022, 50.0)],
        }
        comparison = Comparison(WORKLOADS["35"], turns, floor=0.0055)
        assert comparison.median(OURS, "prefill") == 2.0
        assert comparison.spread(OURS, "rate") == "±20.0%"
        ours, peer = decode_rows(comparison, "vllm")
        assert (ours["tokens/s × vllm"], ours["step × vllm"]) == (2.0, pytest.approx(2.0))
        assert (ours["prefill s"], ours["ms a step"], ours["% of floor"]) == (2.0, pytest.approx(11), "50.0%")
        assert (peer["engine"], peer["tokens/s × vllm"], peer["step × vllm"], peer["% of floor"]) == (
            "vllm", 1.0, 1.0, "25.0%"
        )  # fmt: skip
        assert ours.keys() == peer.keys()
        (ours, _) = prefill_rows(comparison, "vllm")
        assert ours["× vllm"] == 2.0

    def test_alone_and_on_a_cpu_there_is_nothing_to_compare_with(self):
        (row,) = decode_rows(Comparison(WORKLOADS["1"], {OURS: [Turn(1.0, 0.01, 9.0)]}), None)
        assert not {key for key in row if "×" in key or "floor" in key}

    def test_a_given_workload_has_the_columns_of_the_readme(self):
        saved = json.loads((Path(bench.__file__).parent / "results/cpu/engine-smollm2-transformers.json").read_text())
        comparison = Comparison(WORKLOADS["1"], {OURS: [Turn(1, 0.1, 9)], "transformers": [Turn(1, 0.1, 9)]})
        assert list(brief_rows(comparison, "transformers")[0]) == list(saved["rows"][0])


class TestFloor:
    def test_qwen2_7b(self):
        _, config = Model.open(str(SHAPES / "qwen2-7b"), "dummy", "bfloat16")
        weights = 2 * (7_615_616_512 - 152064 * 3584)  # the published count, but for the embedding
        kv = (128 + 250) * 2 * 28 * 4 * 128 * 2
        assert step_floor(config, torch.bfloat16, WORKLOADS["1"], 1e12) == pytest.approx((weights + kv) / 1e12)

    def test_a_tied_head_is_read(self):
        _, config = Model.open(str(SHAPES / "qwen2-0.5b"), "dummy", "bfloat16")
        assert step_floor(config, torch.bfloat16, WORKLOADS["1"], 1.0) > 2 * 494_032_768


class TestVLLM:
    def test_what_it_is_asked(self, vllm, folder):
        engine = VLLM(Model(folder, "dummy", "bfloat16", 700))
        (options,) = vllm.loads
        assert options["model"] == folder and options["load_format"] == "dummy"
        assert (options["dtype"], options["max_model_len"]) == ("bfloat16", 700)
        assert options["skip_tokenizer_init"] and options["enable_prefix_caching"] is False
        assert 0 < options["gpu_memory_utilization"] < 0.5
        assert not {"enforce_eager", "async_scheduling", "compilation_config"} & options.keys()
        assert engine.seconds([[1, 2], [3]], 5, {}) > 0
        engine.seconds([[1]], 2, {"temperature": 0.7, "top_k": 50})
        (greedy, sampled) = vllm.calls
        assert greedy[0] == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]
        fixed = {"ignore_eos": True, "detokenize": False}
        assert greedy[1:] == ({"max_tokens": 5, "temperature": 0.0, **fixed}, False)
        assert sampled[1] == {"max_tokens": 2, "temperature": 0.7, "top_k": 50, **fixed}

    def test_too_few_tokens_are_an_error(self, monkeypatch, folder):
        monkeypatch.setitem(sys.modules, "vllm", FakeVLLM(missing=1))
        with pytest.raises(RuntimeError, match="vllm was asked for 5 tokens a request and gave 4"):
            VLLM(Model(folder, "dummy", "bfloat16", 64)).seconds([[1]], 5, {})


class TestCommand:
    @pytest.mark.parametrize(
        "arguments, words",
        [
            (["--cases", "35", "two"], "there is no case 'two'; there are: 1, 1-sampled"),
            (["--cases", "1", "--requests", "1"], "give one of the two"),
            (["--requests", "1", "0"], "--requests [1, 0] must be at least 1"),
            (["--rounds", "0"], "--rounds 0 must be at least 1"),
            (["--policies", "--peer", "vllm"], "take no --peer"),
            (["--startup", "--peer", "transformers"], "no peer but vllm"),
            (["--peer", "transformers", "--load-format", "dummy"], "random weights would differ"),
            (["--peer", "transformers", "--model", str(SHAPES / "qwen2-7b")], "random weights would differ"),
        ],
    )
    def test_what_makes_no_sense_is_said(self, arguments, words, capsys):
        with pytest.raises(SystemExit):
            bench.parse(arguments)
        assert words in capsys.readouterr().err

    def test_a_model_that_is_not_there_is_named(self, capsys):
        with pytest.raises(SystemExit, match="2"):
            bench.main(["--model", "no-such-model", "--requests", "1"])
        assert "error: no-such-model does not exist; a model is " in capsys.readouterr().err

    def test_a_peer_that_is_not_installed_is_one_line(self, monkeypatch, capsys):
        monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
        options = bench.parse(["--peer", "vllm", "--requests", "1", "--model", str(SHAPES / "qwen2-7b")])
        assert options.peer is None
        assert capsys.readouterr().out == "vllm is not installed: micro-vllm runs alone\n"

    def test_on_a_gpu_vllm_means_the_list_in_qwen2_7bs_shape(self, monkeypatch, vllm):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        options = bench.parse(["--peer", "vllm", "--quick"])
        assert (options.model, options.load_format) == (str(SHAPES / "qwen2-7b"), "dummy")
        assert [w.name for w in options.workloads] == list(WORKLOADS)
        assert {w.tokens for w in options.workloads} == {1, 16}

    def test_requests_beside_transformers(self, folder, results, capsys):
        workload = ["--requests", "1", "2", "--prompt", "8", "--tokens", "4", "--rounds", "1"]
        bench.main(["--model", folder, "--peer", "transformers", *workload])
        rows = results("engine-small-transformers")["rows"]
        assert [(row["requests"], row["engine"]) for row in rows] == [
            (n, name) for n in (1, 2) for name in (OURS, "transformers")
        ]
        assert all(row["tokens/s"] > 0 for row in rows)
        assert "| 2 | transformers |" in capsys.readouterr().out

    def test_cases_beside_vllm(self, folder, results, vllm, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        cases = ["--cases", "1", "1-sampled", "prefill-35"]
        bench.main(["--model", folder, "--peer", "vllm", *cases, "--quick", "--rounds", "2"])
        saved = results("cases-small-vllm-quick")
        assert saved["max_model_len"] == vllm.loads[0]["max_model_len"] == 513
        assert [row["case"] for row in saved["rows"]] == ["1", "1", "1-sampled", "1-sampled"]
        assert [len(turns) for turns in saved["points"][0]["turns"].values()] == [2, 2]
        prefill = results("prefill-small-vllm-quick")
        assert [(row["case"], row["engine"]) for row in prefill["rows"]] == [
            ("prefill-35", OURS), ("prefill-35", "vllm")
        ]  # fmt: skip
        assert "128 / 16, temperature 0.7" in capsys.readouterr().out


class TestPolicies:
    REQUESTS = policies.Requests(count=6, prompt=(4, 24), output=(2, 6), running=3)

    def test_the_report_has_every_policy_and_both_ways_of_arriving(self, model, capsys):
        rows = policies.bench(model, VOCAB_SIZE, self.REQUESTS, 2)
        assert [(row["policy"], row["window"]) for row in rows[:6]] == [
            ("fcfs", "unlimited"),
            ("sjf", "unlimited"),
            *(("sjf_aligned", window) for window in (0, 16, 256, "unlimited")),
        ]
        assert [row["arrivals"] == "at once" for row in rows] == [True] * 6 + [False] * 6
        for row in rows:
            assert 0 < row["first token s"] <= row["first token 99 % s"] <= row["completion 99 % s"]
            assert row["first token s"] < row["completion s"] and row["tokens/s"] > 0
            assert row["longest wait s"] > 0

    def test_every_request_gets_its_tokens(self, model):
        engine = our_engine(model, max_batch_size=3, progress=False)
        drawn = self.REQUESTS.draw(VOCAB_SIZE)
        run = policies.drive(engine, drawn, [0.0] * 3 + [0.01] * 3)
        lengths = {output.request_id: len(output.token_ids) for output in run.outputs}
        assert [lengths[request] for request in sorted(lengths)] == [tokens for _, tokens in drawn]

    def test_medians_of_turns(self):
        turns = [{"tokens/s": rate, "completion s": 1 / rate} for rate in (90.0, 110.0, 100.0)]
        assert policies.medians("at once", "sjf", 16, turns) == {
            "arrivals": "at once",
            "policy": "sjf",
            "window": 16,
            "tokens/s": 100.0,
            "tokens/s ±": "±10.0%",
            "completion s": 0.01,
        }

    def test_figures_of_a_run(self):
        outputs = [
            SimpleNamespace(token_ids=[0] * 5, timings=SimpleNamespace(to_first_token=float(i), total=2.0 * i))
            for i in range(1, 102)
        ]
        row = policies.row(policies.Run(10.0, outputs, 7.0))
        assert row == {
            "tokens/s": 50.5,
            "first token s": mean(range(1, 102)),
            "first token 99 % s": pytest.approx(100),
            "completion s": 102.0,
            "completion 99 % s": pytest.approx(200),
            "longest wait s": 7.0,
        }


class FakeStreams:
    """An engine of a token a millisecond for every request, 7 ms in the step that computes a new one's prompt."""

    def __init__(self, long: int = 10**9, ends_at: int = 10**9):
        self.now, self.next, self.long, self.ends_at = 0.0, 0, long, ends_at
        self.waiting: list[int] = []
        self.running: dict[int, int] = {}

    def perf_counter(self):
        return self.now

    def add_request(self, prompt, **options):
        self.next += 1
        self.waiting.append(self.next)
        return self.next

    def step(self):
        self.now += 0.007 if self.waiting else 0.001
        self.running |= dict.fromkeys(self.waiting, 0)
        self.waiting = []
        self.running = {request: count + 1 for request, count in self.running.items()}
        return [
            SimpleNamespace(request_id=request, token_id=0, output=object() if count >= self.ends_at else None)
            for request, count in self.running.items()
        ]

    def abort(self, request):
        self.running.pop(request, None)


class TestGap:
    ARRIVAL = gap.Arrival(streams=3, shortest=4, longest=8, prompt=40, settled=2, tokens=5)

    def test_the_gap_spans_the_arrival(self, monkeypatch):
        engine = FakeStreams()
        monkeypatch.setattr(gap, "time", engine)
        gaps = gap.stream_gaps(engine, self.ARRIVAL, VOCAB_SIZE)
        assert gaps == {
            "median gap before ms": pytest.approx(1),
            "largest before ms": pytest.approx(1),
            "largest after ms": pytest.approx(7),
            "first token of the prompt ms": pytest.approx(7),
        }
        assert not engine.running

    def test_a_stream_that_ends_is_an_error(self, monkeypatch):
        engine = FakeStreams(ends_at=4)
        monkeypatch.setattr(gap, "time", engine)
        with pytest.raises(RuntimeError, match="ended after 3 tokens"):
            gap.stream_gaps(engine, self.ARRIVAL, VOCAB_SIZE)

    def test_on_a_small_model(self, folder, results):
        bench.main(["--model", folder, "--gap", "--quick", "--rounds", "2"])
        rows = results("gap-small-quick")["rows"]
        assert [row["round"] for row in rows] == [1, 2]
        assert all(row["largest after ms"] > 0 for row in rows)


class TestStartup:
    def test_a_process_says_how_far_it_is(self, model, tmp_path):
        reached = startup.seconds(OURS, model, tmp_path)
        assert set(reached) == {*startup.STAGES, startup.CAPTURING}
        assert reached[startup.CAPTURING] == 0.0  # a CPU has no graphs
        assert 0 < reached["imported"] < reached["built"] < reached["first token"]

    def test_a_process_that_fails_is_an_error(self, tmp_path):
        with pytest.raises(RuntimeError, match="micro-vllm did not start: exit code 1 after \\['imported'\\]"):
            startup.seconds(OURS, Model(str(tmp_path / "nothing"), "auto", "float32"), tmp_path)

    def test_cold_then_warm(self, model, monkeypatch):
        caches = []

        def seconds(engine, model, folder):
            caches.append(folder)
            return dict.fromkeys(startup.STAGES, 1.0) | ({startup.CAPTURING: 0.5} if engine == OURS else {})

        monkeypatch.setattr(startup, "seconds", seconds)
        rows = startup.bench([OURS, "vllm"], model)
        assert [(row["engine"], row["compile cache"]) for row in rows] == [
            (OURS, "cold"), (OURS, "warm"), ("vllm", "cold"), ("vllm", "warm")
        ]  # fmt: skip
        assert [row["capturing s"] for row in rows] == [0.5, 0.5, "–", "–"]
        assert caches[0] == caches[1] != caches[2] == caches[3]


class TestPicture:
    @pytest.fixture
    def cases(self, tmp_path):
        """A record of two workloads, beside a peer and a floor."""
        turns = {OURS: [Turn(0.1, 0.004, 200.0), Turn(0.1, 0.005, 190.0)], "vllm": [Turn(0.1, 0.006, 150.0)]}
        points = [point(Comparison(WORKLOADS[name], turns, 0.003)) for name in ("1", "35-sampled")]
        return self.save(tmp_path, kind="cases", points=points)

    @staticmethod
    def save(folder: Path, **about) -> Path:
        about |= {"model": "qwen2-7b", "dtype": "bfloat16", "device": "a GPU", "date": "today", "commit": "0123abc"}
        path = folder / "results" / "gpu" / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(about))
        return path

    def test_cases(self, cases):
        pytest.importorskip("matplotlib")
        picture.draw_beside(cases, engine_picture.draw)
        assert cases.with_suffix(".png").stat().st_size > 10_000
        panels = engine_picture.cases_figure(json.loads(cases.read_text())).axes
        assert [axes.get_xlabel() for axes in panels] == ["ms a step", "tokens/s, × vllm's"]
        assert set(panels[0].get_legend_handles_labels()[1]) == {"memory floor", OURS, "vllm"}
        assert [bar.get_width() for bar in panels[1].patches] == [1.3, 1.3, 1, 1]

    def test_prefill(self, tmp_path):
        pytest.importorskip("matplotlib")
        turns = {OURS: [Turn(0.1, None, 200.0)], "vllm": [Turn(0.2, None, 100.0)]}
        path = self.save(tmp_path, kind="cases", points=[point(Comparison(WORKLOADS["prefill-4096"], turns))])
        (axes,) = engine_picture.cases_figure(json.loads(path.read_text())).axes
        assert axes.get_xlabel() == "ms to the first token of all, × vllm's"
        assert [bar.get_width() for bar in axes.patches] == [0.5, 1]
        assert [text.get_text() for text in axes.texts] == ["100", "200"]

    def test_policies(self, tmp_path):
        pytest.importorskip("matplotlib")
        columns = [column for pair in engine_picture.PANELS.values() for column in pair if column]
        rows = [
            {"arrivals": way, "policy": name, "window": window, **dict.fromkeys(columns, 1.0 + i)}
            for way in ("at once", "over 9 s")
            for i, (name, window) in enumerate(policies.POLICIES)
        ]
        path = self.save(tmp_path, kind="policies", rows=rows)
        picture.draw_beside(path, engine_picture.draw)
        assert path.with_suffix(".png").stat().st_size > 10_000

    def test_without_matplotlib_there_are_words(self, cases, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        picture.draw_beside(cases, engine_picture.draw)
        assert capsys.readouterr().out.startswith("no picture: ")
        assert not cases.with_suffix(".png").exists()

    def test_pictures_can_be_drawn_again(self, cases, monkeypatch):
        drawn = []
        (cases.parent / "other.json").write_text('{"rows": []}')
        monkeypatch.setattr(record, "RESULTS", cases.parent.parent)
        monkeypatch.setattr(engine_picture, "draw", lambda read, path: drawn.append(path))
        bench.main(["--draw"])
        assert drawn == [cases.with_suffix(".png")]


def test_the_share_beside_a_peer_counts_what_the_peer_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (58, 100))
    assert engines.share_beside() == pytest.approx(0.42 + engines.SHARE)
