"""What the README and docs/lab.md show runs, and the README's tables are those of the results."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from microvllm.bench.report import with_tables
from microvllm.engine.cli import main

from .test_adapters import save_hub_kernel

ROOT = Path(__file__).parents[1]
README, LAB = ((ROOT / name).read_text() for name in ("README.md", "docs/lab.md"))
MARKED = re.compile(r"<!-- bench: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def test_the_python_blocks_run_in_their_order(capsys):
    """Those that need a server run in tests/server."""
    blocks = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "from openai" not in block]
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "The capital of France is →  Paris" in shown
    assert "EngineStats(running=0" in shown


def test_the_labs_python_blocks_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_hub_kernel(tmp_path / "tiny-norm")
    blocks = re.findall(r"```python\n(.*?)```", LAB, re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "lab.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "b is as right as a" in shown and "rms_norm, hub_rms_norm, on " in shown
    assert (tmp_path / "my_rms_norm.json").is_file() and names["figure"].axes


@pytest.mark.parametrize(
    "line",
    dict.fromkeys(re.findall(r"^micro-vllm kernels .*", README + LAB, re.MULTILINE)),  # some stand in both
)
def test_the_kernel_commands_run(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import torch\n\ndef my_rms_norm(x, weight, eps):\n"
        "    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)\n"
    )
    assert main(shlex.split(line)[1:]) == 0
    assert capsys.readouterr().out and ("--html" not in line or Path("report.html").is_file())


def test_the_tables_are_those_of_the_results():
    assert len(MARKED.findall(README)) >= 4
    assert with_tables(README) == README, "run python -m bench.report"


def test_a_table_that_differs_is_seen():
    name, body = MARKED.findall(README)[0]
    changed = README.replace(body, body.replace("|", "| 1", 1))
    assert changed != README and with_tables(changed) == README, name


def test_a_table_without_a_result_is_an_error():
    with pytest.raises(FileNotFoundError):
        with_tables("<!-- bench: cpu/no-such-result -->\n<!-- end -->")
