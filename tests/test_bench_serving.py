"""bench.serving: metrics, tables, the servers it starts, and the whole of it."""

from __future__ import annotations

import json
import math
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from microvllm.bench import engine_picture, engines, picture, record, servers, serving
from microvllm.bench.client import Answer, Load, Run
from microvllm.bench.engines import OURS, Model
from microvllm.bench.serving_metrics import metrics
from microvllm.bench.serving_tables import Comparison, latency_rows, point, rows
from microvllm.bench.workloads import Workload

from .checkpoints import save_folder
from .test_bench_client import FakeServer, stream


def answer(start: float, *tokens: float, error: str | None = None) -> Answer:
    return Answer(start, 0.0, tokens, prompt_tokens=10, output_tokens=len(tokens), error=error)


class TestMetrics:
    RUN = Run(
        [
            answer(0.0, 0.1, 0.2, 0.4),
            answer(0.0, 0.3, 0.5, 0.7),
            answer(0.7, 0.2),
            answer(0.0, error="no luck"),
        ],
        duration=2.0,
        cpu_share=0.25,
    )

    def test_values(self):
        found = metrics(self.RUN, Load())
        assert (found["completed"], found["failed"], found["errors"]) == (3, 1, {"no luck": 1})
        assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 7)
        assert found["request_throughput"] == 1.5 and found["output_throughput"] == 3.5
        assert found["total_token_throughput"] == 18.5
        assert found["mean_ttft_ms"] == pytest.approx(200) and found["median_ttft_ms"] == pytest.approx(200)
        assert found["p90_ttft_ms"] == pytest.approx(280) and found["p99_ttft_ms"] == pytest.approx(298)
        assert found["std_ttft_ms"] == pytest.approx(np.std([100, 200, 300]))
        # Where there is one token, there is no time per token.
        assert found["mean_tpot_ms"] == pytest.approx((150 + 200) / 2)
        assert found["median_itl_ms"] == pytest.approx(200) and found["mean_itl_ms"] == pytest.approx(175)
        assert found["median_e2el_ms"] == pytest.approx(400) and found["p99_e2el_ms"] == pytest.approx(694)
        # The third starts when the second ends.
        assert (found["max_concurrent_requests"], found["max_output_tokens_per_s"]) == (2, 7)
        assert found["cpu_share"] == 0.25

    def test_goodput(self):
        def good(**bounds: float) -> float:
            return metrics(self.RUN, Load(), bounds)["request_goodput"]

        assert metrics(self.RUN, Load())["request_goodput"] is None
        assert good(ttft=250) == 1.0
        assert good(ttft=1000, tpot=160, e2el=1000) == 1.0  # a single token has a tpot of 0
        assert good(e2el=300) == 0.5
        assert good(ttft=1) == 0

    def test_the_keys_of_vllm(self):
        keys = {
            "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
            "request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
            "max_concurrent_requests", "num_prompts", "request_rate", "burstiness", "max_concurrency",
        }  # fmt: skip
        of_each = ("mean", "median", "std", "p90", "p99")
        keys |= {f"{what}_{name}_ms" for what in of_each for name in ("ttft", "tpot", "itl", "e2el")}
        found = metrics(self.RUN, Load())
        assert keys <= found.keys()
        assert found["request_rate"] == "inf"
        json.dumps(found, allow_nan=False)

    def test_none_completed(self):
        run = Run([answer(0.0, error="no luck"), answer(math.nan, error="no luck")], 1.0, 0.1)
        with pytest.raises(RuntimeError, match="no request of 2 completed: 2 × no luck"):
            metrics(run, Load())


def turn(tpot: float, rate: float, **changes) -> dict:
    found = metrics(TestMetrics.RUN, Load())
    return found | {"median_tpot_ms": tpot, "output_throughput": rate, "failed": 0} | changes


TURNS = {OURS: [turn(10, 90), turn(12, 100), turn(11, 130)], "vllm": [turn(22, 50)]}


class TestTables:
    WORKLOAD = Workload("35", 35, (128, 512), 500)

    def test_rows(self):
        ours, peer = rows(Comparison(self.WORKLOAD, TURNS, [105, 125, 110]), "vllm")
        assert (ours["TPOT ms"], ours["TPOT ±"], ours["tokens/s"], ours["±"]) == (11, "±9.1%", 100, "±20.0%")
        assert (ours["TPOT × vllm"], ours["tokens/s × vllm"], ours["of offline"]) == (2.0, 2.0, "90.9%")
        assert (peer["TPOT × vllm"], peer["tokens/s × vllm"], peer["of offline"]) == (1.0, 1.0, "")
        assert ours.keys() == peer.keys() and ours["client CPU"] == "25%"

    def test_alone(self):
        turns = {OURS: [turn(10, 90, failed=1, request_goodput=1.5), turn(10, 90, failed=2, request_goodput=2.5)]}
        (row,) = rows(Comparison(self.WORKLOAD, turns), None)
        assert (row["failed"], row["goodput req/s"]) == (3, 2.0)
        assert not {key for key in row if "×" in key or "offline" in key}

    def test_all_tokens_in_one_event_take_no_time(self):
        turns = {OURS: [turn(0, 90)], "vllm": [turn(22, 50)]}
        (ours, peer) = rows(Comparison(self.WORKLOAD, turns), "vllm")
        assert (ours["TPOT ms"], ours["TPOT ±"], ours["TPOT × vllm"], peer["TPOT × vllm"]) == (0, "", "", 1)

    def test_latencies(self):
        shown = latency_rows(Comparison(self.WORKLOAD, TURNS))
        assert [(row["server"], row["ms"]) for row in shown[:3]] == [
            (OURS, "time to first token"), ("vllm", "time to first token"), (OURS, "time per output token")
        ]  # fmt: skip
        assert shown[2]["median"] == 11 and {"mean", "p90", "p99"} < shown[2].keys()

    def test_picture(self, tmp_path):
        pytest.importorskip("matplotlib")
        points = [point(Comparison(Workload(str(n), n, (8, 8), 4), TURNS, [110])) for n in (1, 35, 128)]
        about = {"model": "qwen2-7b", "dtype": "bfloat16", "device": "a GPU", "date": "today", "commit": "0123abc"}
        path = tmp_path / "serving.json"
        path.write_text(json.dumps(about | {"kind": "serving", "points": points}))
        picture.draw_beside(path, engine_picture.draw)
        assert path.with_suffix(".png").stat().st_size > 10_000
        panels = engine_picture.FIGURES["serving"](json.loads(path.read_text())).axes
        assert [axes.get_title() for axes in panels][::2] == [
            "time to first token, ms", "inter-token latency, ms", "output tokens/s"
        ]  # fmt: skip
        assert [len(axes.lines) for axes in panels] == [6, 6, 6, 6, 3]
        assert list(panels[1].lines[0].get_ydata()) == [11, 11, 11]


PROGRAM = textwrap.dedent(
    """
    import http.server, json, os, sys, threading, time

    options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
    served = 0

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if time.monotonic() > healthy_at else 503)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": "served"}]}).encode())

        def do_POST(self):
            global served
            served += 1
            if served > int(os.environ.get("DIES_AFTER", 10**9)):
                print("a kernel panicked", flush=True)
                os._exit(3)
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            for _ in range(asked["max_tokens"]):
                self.wfile.write(b'data: {"choices": [{"text": "a"}]}\\n\\n')
                time.sleep(0.002)
            self.wfile.write(b"data: [DONE]\\n\\n")

        def log_message(self, *_):
            pass

    healthy_at = time.monotonic() + 0.3
    http.server.ThreadingHTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
    """
)
"""A server of two milliseconds a token, with the options of ours."""


@pytest.fixture
def program(monkeypatch):
    """In the place of our server and of vLLM's."""
    monkeypatch.setattr(servers, "OUR_PROGRAM", PROGRAM)
    monkeypatch.setattr(servers, "VLLM_PROGRAM", ["-c", PROGRAM])
    monkeypatch.setattr(servers, "POLL", 0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "small"
    save_folder(folder, max_position_embeddings=1024, eos_token_id=None)
    return str(folder)


class TestServers:
    def test_of_ours(self, program, monkeypatch):
        commands = []
        monkeypatch.setattr(servers, "Server", lambda name, command, url, environment=None: commands.append(command))
        servers.start(OURS, Model("bench/shapes/qwen2-7b", "dummy", "bfloat16", 700), 0.5)
        (program, command, place, *options) = commands[0][2:]
        assert (program, command, place) == (servers.OUR_PROGRAM, "serve", "bench/shapes/qwen2-7b")
        assert options.pop() == "--no-enable-prefix-caching"
        named = dict(zip(options[::2], options[1::2], strict=True))
        assert int(named.pop("--port")) > 0
        assert named == {
            "--host": "127.0.0.1", "--served-model-name": "qwen2-7b", "--dtype": "bfloat16", "--max-model-len": "700",
            "--max-num-seqs": "256", "--load-format": "dummy", "--gpu-memory-utilization": "0.5",
        }  # fmt: skip

    def test_of_vllm(self, folder, program, monkeypatch):
        commands = []
        monkeypatch.setattr(servers, "Server", lambda name, command, *rest: commands.append((command, rest[-1])))
        for load_format in ("dummy", "auto"):
            servers.start("vllm", Model(folder, load_format, "float32", 64), None)
        (dummy, environment), (auto, _) = commands
        assert dummy[-1] == "--skip-tokenizer-init" not in auto
        assert "--gpu-memory-utilization" not in auto
        assert environment == engines.VLLM_ENVIRONMENT

    def test_it_is_waited_for_and_ends(self, program):
        with servers.start(OURS, Model("m", "auto", "float32", 64), None) as server:
            start = time.monotonic()
            server.wait(timeout=30)
            assert time.monotonic() - start > 0.2
            server.check()
        with pytest.raises(OSError):
            server.endpoint.get("/health", timeout=1)

    def test_one_that_ends_at_once(self):
        program = "print('no such model'); raise SystemExit(2)"
        with (
            servers.Server("x", [sys.executable, "-c", program], "http://127.0.0.1:9") as server,
            pytest.raises(RuntimeError, match="x ended with exit code 2; it said last:\nno such model"),
        ):
            server.wait(timeout=30)

    def test_one_that_is_never_healthy(self):
        program = "import time; time.sleep(60)"
        url = f"http://127.0.0.1:{servers.free_port()}"
        with (
            servers.Server("x", [sys.executable, "-c", program], url) as server,
            pytest.raises(RuntimeError, match=r"x was not healthy after 0.3 s, and said nothing"),
        ):
            server.wait(timeout=0.3)

    def test_its_children_end_with_it(self, monkeypatch):
        monkeypatch.setattr(servers, "GRACE", 0.2)
        program = "import subprocess, signal, sys\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        program += "child = subprocess.Popen(['sleep', '60'])\nprint(child.pid, flush=True)\nchild.wait()"
        with servers.Server("x", [sys.executable, "-c", program], "http://127.0.0.1:9") as server:
            deadline = time.monotonic() + 20
            while server._last_words().endswith("nothing") and time.monotonic() < deadline:
                time.sleep(0.02)
            child = int(server._last_words().split()[-1])
        deadline = time.monotonic() + 20
        while runs(child):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def runs(pid: int) -> bool:
    """A process that has been killed may be a zombie for as long as nobody asks how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class TestCommand:
    @pytest.fixture
    def results(self, tmp_path, monkeypatch):
        monkeypatch.setattr(record, "RESULTS", tmp_path)
        monkeypatch.setenv("MICROVLLM_COMMIT", "0123abc")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        return lambda name: json.loads(next(tmp_path.glob(f"*/{name}.json")).read_text())

    REQUESTS = ("--requests", "1", "3", "--prompt", "8", "--tokens", "6", "--rounds", "2")

    def test_beside_vllm_and_offline(self, folder, program, results, monkeypatch, capsys):
        monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: object())
        serving.main(["--model", folder, "--peer", "vllm", "--offline", "--goodput", "e2el:10000", *self.REQUESTS])
        saved = results("serving-small-vllm")
        assert [(row["case"], row["server"]) for row in saved["rows"]] == [
            (case, server) for case in ("1", "3") for server in (OURS, "vllm")
        ]
        # Six tokens, 2 ms apart, whatever became of the first.
        assert all(row["tokens/s"] > 0 and row["failed"] == 0 and row["E2EL ms"] >= 10 for row in saved["rows"])
        assert saved["max_model_len"] == 14 and saved["goodput"] == {"e2el": 10000}
        turns = saved["points"][1]["turns"]
        assert [len(turns[server]) for server in (OURS, "vllm")] == [2, 2]
        assert turns[OURS][0]["total_output_tokens"] == 18
        assert len(saved["points"][1]["offline"]) == 2
        assert "| 3 | micro-vllm | time per output token |" in capsys.readouterr().out

    def test_a_server_that_runs_already(self, folder, program, results):
        with servers.start(OURS, Model("m", "auto", "float32", 64), None) as server:
            server.wait(timeout=30)
            url = server.endpoint.url
            serving.main(["--model", folder, "--base-url", url, "--request-rate", "100", *self.REQUESTS])
        saved = results("serving-small-given")
        assert [row["server"] for row in saved["rows"]] == [url] * 2
        assert saved["points"][0]["turns"][url][0]["request_rate"] == 100

    def test_a_server_that_dies_is_reported(self, folder, program, results, monkeypatch):
        monkeypatch.setenv("DIES_AFTER", "5")
        start = time.monotonic()
        with pytest.raises(SystemExit, match="micro-vllm ended with exit code 3; it said last:\na kernel panicked"):
            serving.main(["--model", folder, *self.REQUESTS])
        assert time.monotonic() - start < 30

    def test_failed_requests_are_said(self, folder, results, monkeypatch, capsys):
        failing = iter([False] * 3 + [True] * 9)

        async def answer(asked, writer):
            if not asked:
                body = b'{"data": [{"id": "m"}]}'
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            elif asked["prompt"][0] % 2 and next(failing):
                writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nfull")
            else:
                await stream(asked, writer)

        prompts = [[0] * 8, [1] * 8, [2] * 8]
        monkeypatch.setattr(Workload, "prompts", lambda self, vocab_size: prompts)
        options = ["--requests", "3", "--prompt", "8", "--tokens", "6", "--rounds", "4"]
        with FakeServer(answer).serve() as url, pytest.raises(SystemExit, match="error: 2 requests failed"):
            serving.main(["--model", folder, "--base-url", url, *options])
        assert f"{url}: 1 of 3 requests failed: HTTP 429: full" in capsys.readouterr().out
        assert results("serving-small-given")["rows"][0]["failed"] == 2

    def test_a_model_that_is_not_there_is_named(self, capsys):
        with pytest.raises(SystemExit, match="2"):
            serving.main(["--model", "no-such-model", "--requests", "1"])
        assert "error: no-such-model does not exist; a model is " in capsys.readouterr().err

    def test_no_server(self, folder):
        url = f"http://127.0.0.1:{servers.free_port()}"
        with pytest.raises(SystemExit, match=f"error: there is no server at {url}"):
            serving.main(["--model", folder, "--base-url", url])

    @pytest.mark.parametrize(
        "arguments, words",
        [
            (["--cases", "1", "--requests", "1"], "give one of the two"),
            (["--cases", "two"], "there is no case 'two'"),
            (["--cases", "prefill-35"], "'prefill-35' has one"),
            (["--base-url", "http://127.0.0.1:1"], "of a --model that it is given"),
            (["--base-url", "http://127.0.0.1:1", "--model", "m", "--offline"], "neither --peer nor --offline"),
            (["--base-url", "127.0.0.1:1", "--model", "m"], "'127.0.0.1:1' is not the root of a server"),
            (["--offline", "--request-rate", "3"], "neither --request-rate nor"),
            (["--request-rate", "0"], "a request rate is over 0"),
            (["--goodput", "ttft"], "--goodput takes NAME:MS, as in ttft:200, and not 'ttft'"),
            (["--goodput", "itl:5"], "bounds ttft, tpot, e2el"),
            (["--rounds", "0"], "--rounds is at least 1"),
        ],
    )
    def test_what_makes_no_sense_is_said(self, arguments, words, capsys):
        with pytest.raises(SystemExit):
            serving.parse(arguments)
        assert words in capsys.readouterr().err

    def test_defaults(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        options = serving.parse([])
        assert (options.model, options.load_format) == ("smollm2", "auto")
        assert [workload.requests for workload in options.workloads] == [1, 4]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        options = serving.parse(["--goodput", "ttft:200", "tpot:20.5"])
        assert (options.model, options.load_format) == (str(serving.SHAPES / "qwen2-7b"), "dummy")
        assert [workload.requests for workload in options.workloads] == [1, 35, 128]
        assert options.goodput == {"ttft": 200, "tpot": 20.5}

    def test_a_peer_that_is_not_installed_is_one_line(self, monkeypatch, capsys):
        monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
        assert serving.parse(["--peer", "vllm", "--model", str(serving.SHAPES / "qwen2-7b")]).peer is None
        assert capsys.readouterr().out == "vllm is not installed: micro-vllm serves alone\n"

    def test_engines_share_a_gpu(self, monkeypatch):
        started = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (50, 100))
        monkeypatch.setattr(serving, "Ours", lambda model, **options: started.append(("offline", options)))
        server = SimpleNamespace(wait=lambda timeout: None, endpoint=None)
        entered = SimpleNamespace(enter_context=lambda _: server)
        monkeypatch.setattr(servers, "start", lambda name, model, share: started.append((name, share)))
        model, options = Model("m", "auto", "float32"), SimpleNamespace(peer="vllm", offline=False, start_timeout=1)
        assert list(serving.start(model, options, entered)[0]) == [OURS, "vllm"]
        assert started == [("vllm", 0.46), (OURS, 0.95)]
        started.clear()
        options.peer = None
        serving.start(model, options, entered)
        assert started == [(OURS, None)]
