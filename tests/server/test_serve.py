"""The command `micro-vllm serve` as a process: how it begins and how it ends."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from microvllm.engine.cli import main

from ..documents import marked
from .served_process import COMMAND, ServedProcess

FLAGS = ["--max-num-seqs", "4", "--block-size", "16", "--device", "cpu", "--quiet"]


@pytest.fixture
def start(folder):
    """(arguments, program) → a ServedProcess of the small model; all are killed in the end"""
    started = []

    def start(*arguments: str, program=COMMAND) -> ServedProcess:
        started.append(ServedProcess(str(folder), *FLAGS, *arguments, program=program))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def plain(folder):
    """One that no test ends."""
    server = ServedProcess(str(folder), *FLAGS)
    yield server
    server.kill()


ORIGIN = ["--allowed-origins", "http://x"]


def test_names_lengths_and_keys_reach_the_client(start):
    server = start("--served-model-name", "a", "b/c", "--max-model-len", "100", "--api-key", "k1", "k2", *ORIGIN)
    answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer k2"}).json()
    assert [(model["id"], model["max_model_len"]) for model in answer["data"]] == [("a", 100), ("b/c", 100)]
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    answer = httpx.get(f"{server.url}/health", headers={"Origin": "http://x"})
    assert answer.headers["access-control-allow-origin"] == "http://x"
    assert server.stop() == 0


def test_the_log_has_a_line_a_request_but_none_for_the_view(plain):
    for path in ("/view", "/view?a=1", "/version"):
        assert httpx.get(plain.url + path).status_code == 200
    assert re.search(r'"GET /version HTTP/1.1" 200', plain.log())
    assert re.search(r'"GET /view\?a=1 HTTP/1.1" 200', plain.log())
    assert '"GET /view HTTP' not in plain.log()


def test_flags_reach_the_engine(monkeypatch):
    built = []

    def build(model, **options):
        built.append((model, options))
        raise ValueError("enough")

    monkeypatch.setattr("microvllm.engine.cli_options.InferenceEngine", build)
    flags = "--dtype float16 --max-model-len 100 --max-num-seqs 5 --max-num-batched-tokens 64 --block-size 32 --seed 3"
    flags += " --gpu-memory-utilization 0.5 --no-enable-prefix-caching --enforce-eager --scheduling-policy fcfs --quiet"
    flags += " --interleaved-prefill-tokens 9 --load-format dummy"
    assert main(["serve", "m", "--port", "0", "--device", "cpu", *flags.split()]) == 2
    ((model, options),) = built
    options.pop("kernels")
    assert (model, options) == (
        "m",
        {
            "device": "cpu",
            "dtype": "float16",
            "max_model_len": 100,
            "load_format": "dummy",
            "max_batch_size": 5,
            "max_prefill_tokens": 64,
            "interleaved_prefill_tokens": 9,
            "block_size": 32,
            "seed": 3,
            "gpu_memory_utilization": 0.5,
            "enable_prefix_caching": False,
            "enforce_eager": True,
            "policy": "fcfs",
            "progress": False,
        },
    )


@pytest.mark.parametrize("flag", ["--no-such-flag", "--max-num", "--chat-template"])
def test_an_unknown_flag_is_an_error(folder, capsys, flag):
    with pytest.raises(SystemExit) as end:
        main(["serve", str(folder), flag, "5"])
    assert end.value.code == 2 and f"unrecognized arguments: {flag}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--max-num-seqs", "0"], "--max-num-seqs 0 must be at least 1"),
        (["--max-num-batched-tokens", "0"], "--max-num-batched-tokens 0 must be at least 1"),
        (["--api-key", "a", ""], "--api-key '' is empty"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout -1 must be at least 0 seconds and finite"),
        (["--shutdown-timeout", "inf"], "--shutdown-timeout inf must be at least 0 seconds and finite"),
        (["--shutdown-timeout", "nan"], "--shutdown-timeout nan must be at least 0 seconds and finite"),
        (["--gpu-memory-utilization", "2"], "gpu_memory_utilization=2.0 must be"),
        (["--block-size", "8"], "block_size=8 must be an integer from 16 to 256"),
        (["--max-model-len", "129"], "max_model_len=129 must be at most the model's 128"),
    ],
)
def test_a_bad_value_is_one_line(folder, capsys, flags, message):
    assert main(["serve", str(folder), "--port", "0", "--device", "cpu", "--quiet", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("micro-vllm: ") and message in err and err.count("\n") == 1


def test_a_port_in_use_is_one_line_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "no-such-model", "--port", str(port)]) == 1
    assert capsys.readouterr().err == f"micro-vllm: cannot listen at 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize("where", [["--port", "70000"], ["--host", "no.such.host.invalid"], ["--host", "192.0.2.1"]])
def test_an_address_that_cannot_be(capsys, where):
    assert main(["serve", "no-such-model", *where]) == 1
    err = capsys.readouterr().err
    assert err.startswith("micro-vllm: cannot listen at ") and err.count("\n") == 1


def test_missing_packages_are_named(capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert main(["serve", "smollm2"]) == 2
    assert capsys.readouterr().err == 'micro-vllm: serve needs uvicorn: pip install "micro-vllm[server]"\n'


def test_the_engine_needs_none_of_the_server_packages():
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['fastapi', 'uvicorn', 'pydantic', 'prometheus_client']));"
        "import microvllm, microvllm.engine.cli, microvllm.engine.async_engine"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_small_answers_do_not_wait_for_each_other(plain):
    """Without TCP_NODELAY every second packet waits for the client's acknowledgement, some 40 ms."""
    times = []
    with httpx.Client(base_url=plain.url) as client:
        for _ in range(20):
            before = time.monotonic()
            client.post("/tokenize", json={"prompt": "a"}).raise_for_status()
            times.append(time.monotonic() - before)
    assert statistics.median(times) < 0.03


SLOW = """
import sys, time
from microvllm import InferenceEngine
from microvllm.engine.cli import main
step = InferenceEngine.step
def slow(engine):
    time.sleep(0.03)
    return step(engine)
InferenceEngine.step = slow
sys.exit(main())
"""


class Reader(threading.Thread):
    """Streams an answer, and keeps its events."""

    def __init__(self, server: ServedProcess, max_tokens: int):
        super().__init__()
        self.events, self.begun = [], threading.Event()
        self.error: httpx.TransportError | None = None
        self._url, self._body = f"{server.url}/v1/completions", {"prompt": "a", "ignore_eos": True, "stream": True}
        self._body["max_tokens"] = max_tokens
        self.start()
        assert self.begun.wait(20)

    def run(self):
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=30) as answer:
                for line in answer.iter_lines():
                    if line:
                        self.events.append(line.removeprefix("data: "))
                        self.begun.set()
        except httpx.TransportError as error:
            self.error = error

    def reason(self) -> str:
        self.join(30)
        assert self.events[-1] == "[DONE]"
        return json.loads(self.events[-2])["choices"][0]["finish_reason"]


def test_sigterm_lets_answers_finish_and_refuses_new_ones(start):
    server = start(program=[sys.executable, "-c", SLOW])
    reader = Reader(server, 60)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")
    assert reader.reason() == "length" and len(reader.events) == 61
    assert server.process.wait(10) == 0


def test_after_the_timeout_answers_are_cut_short(start):
    server = start("--shutdown-timeout", "0.3", program=[sys.executable, "-c", SLOW])
    reader = Reader(server, 120)
    server.process.send_signal(signal.SIGTERM)
    assert reader.reason() == "abort" and len(reader.events) < 60
    assert server.process.wait(10) == 0


def test_the_engines_death_is_told_and_ends_the_process(start):
    dying = SLOW.replace("time.sleep(0.03)", "if engine.has_work: raise RuntimeError('the GPU is gone')")
    dying = "from microvllm.engine.server import serve\nserve.DEATH_SECONDS = 1\n" + dying
    server = start(program=[sys.executable, "-c", dying])
    assert httpx.get(f"{server.url}/health").status_code == 200
    answer = httpx.post(f"{server.url}/generate", json={"prompt": "a"})
    assert answer.status_code == 503
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert server.process.wait(15) == 1
    log = server.log()
    assert "Traceback" in log and log.endswith("micro-vllm: the engine has died: RuntimeError: the GPU is gone\n")


def test_a_death_in_mid_step_ends_every_open_answer(start):
    dying = SLOW.replace(
        "    time.sleep(0.03)", "    time.sleep(0.03)\n    steps.append(1) if engine.has_work else None"
    )
    dying = dying.replace(
        "    return step(engine)", "    if len(steps) > 20: raise RuntimeError('gone')\n    return step(engine)"
    )
    dying = "from microvllm.engine.server import serve\nserve.DEATH_SECONDS = 1\nsteps = []\n" + dying
    server = start(program=[sys.executable, "-c", dying])
    with ThreadPoolExecutor(2) as pool:
        body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True}
        waiting = [pool.submit(httpx.post, f"{server.url}/generate", json=body, timeout=20) for _ in range(2)]
        reader = Reader(server, 100)
        reader.join(20)
        assert [each.result().status_code for each in waiting] == [503, 503]
    assert json.loads(reader.events[-1])["error"]["code"] == "engine_dead" and 1 < len(reader.events) < 100
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert server.process.wait(15) == 1


def test_a_killed_process_breaks_its_streams_off_and_leaves_its_port_free(start):
    server = start(program=[sys.executable, "-c", SLOW])
    reader = Reader(server, 120)
    server.process.send_signal(signal.SIGKILL)
    reader.join(10)
    assert not reader.is_alive() and reader.events[-1] != "[DONE]"
    assert isinstance(reader.error, httpx.RemoteProtocolError)
    assert server.process.wait(10) == -signal.SIGKILL
    again = start("--port", str(server.port))
    assert again.port == server.port and httpx.get(f"{again.url}/health").status_code == 200


def test_a_second_server_on_the_port_is_refused_and_the_first_goes_on(plain, capsys):
    assert main(["serve", "no-such-model", "--port", str(plain.port)]) == 1
    assert "Address already in use" in capsys.readouterr().err
    assert httpx.get(f"{plain.url}/health").status_code == 200


def test_prompts_are_not_logged(plain):
    httpx.post(f"{plain.url}/generate", json={"prompt": "my secret", "max_tokens": 1}).raise_for_status()
    assert httpx.post(f"{plain.url}/generate", json={"prompt": "my secret" * 50}).status_code == 400
    assert "POST /generate" in plain.log() and "secret" not in plain.log()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_readmes_curl_commands_run(plain):
    block = marked(Path(__file__).parents[2] / "README.md", "sh server", "curl")
    commands = block.replace("http://127.0.0.1:8000", plain.url).replace("curl ", "curl --silent --fail ")
    answers = subprocess.run(["bash", "-ec", commands], capture_output=True, text=True, check=True).stdout
    chat, several, one, stream = re.split(r"(?<=\[DONE\]\n\n)|(?<=\})(?=\{)|(?<=\})(?=data)", answers, maxsplit=3)
    assert chat.startswith('data: {"id":"chatcmpl-') and len(json.loads(several)["results"]) == 2
    assert json.loads(one)["usage"]["completion_tokens"] == 100
    assert stream.startswith('data: {"index":0,"token_id":') and stream.endswith("data: [DONE]\n\n")
