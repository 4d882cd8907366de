"""README.md and docs/ do what they say: every block of code runs, or says what it needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache

import pytest

from .checkpoints import needs_smollm2
from .documents import DOCUMENTS, ROOT, Checkout, blocks, edited

README = ROOT / "README.md"
DOCS = [path for path in DOCUMENTS if path != README]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_a_page_of_docs_can_be_followed(path, checkout):
    checkout.follow(path.read_text(), path.name)


@needs_smollm2
def test_the_readme_can_be_followed(checkout):
    shown = checkout.follow(README.read_text(), README.name)
    assert "The capital of France is →  Paris" in shown
    assert "EngineStats(running=0" in shown
    assert re.search(r"^rms_norm, my_rms_norm, on .*: \d+ right, 0 wrong, 0 refused$", shown, re.MULTILINE)


def all_blocks(*infos: str) -> list:
    return [
        pytest.param(block.code, id=f"{path.name}:{block.line}")
        for path in DOCUMENTS
        for block in blocks(path.read_text())
        if block.info in infos
    ]


@cache
def options_of(module: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"there is no {module}:\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("code", all_blocks("sh gpu", "sh network", "sh server"))
def test_what_does_not_run_here_is_a_command(code):
    subprocess.run(["bash", "-n", "-c", code], check=True)
    for line in code.splitlines():
        if command := re.match(r"python -m (bench\.\w+)([^#]*)", line):
            for option in re.findall(r"--[a-z-]+", command[2]):
                assert re.search(rf"{option}\b", options_of(command[1])), f"{command[1]} has no {option}"


@pytest.mark.parametrize("code", all_blocks("python gpu", "python network", "python server"))
def test_what_does_not_run_here_is_python(code):
    ast.parse(code)


def test_what_a_server_must_answer_is_in_the_readme_alone():
    """tests/server runs these two: the curl commands and openai's client."""
    found = [(path.name, b.info) for path in DOCUMENTS for b in blocks(path.read_text()) if "server" in b.info.split()]
    assert sorted(found) == [("README.md", "python server"), ("README.md", "sh server")]


def test_links_between_the_pages_lead_somewhere():
    for path in DOCUMENTS:
        text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
            place = (path.parent / target).resolve() if target else path
            assert place.exists(), f"{path.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], anchor


class TestTheRunner:
    @pytest.mark.parametrize("info", ["", "bash", "python maybe", "sh gpu network", "diff", "sh x.py"])
    def test_a_block_that_is_neither_run_nor_marked_is_an_error(self, info):
        with pytest.raises(ValueError, match=r"line 3: .* is none of python, python PATH"):
            blocks(f"words\n```{info}\ntrue\n```\n")

    @pytest.mark.parametrize(
        "text, error",
        [
            ("\n\n```python\n\nprint(1 / 0)\n```\n", r'document.md", line 5'),
            ("```sh\necho before\nfalse | true\necho after\n```\n", "exit code 1\nbefore\n$"),
            ("```python\nx = 1\n```\n```sh\ntrue\n```\n```python\nprint(x)\n```\n", "name 'x' is not defined"),
        ],
    )
    def test_a_block_that_fails_is_an_error(self, checkout, text, error):
        with pytest.raises(AssertionError, match=error):
            checkout.follow(text)

    def test_files_are_written_and_edited_in_the_copy_alone(self, checkout):
        written = "```python kernels/seven.py\nSEVEN = 7\n```\n```diff kernels/seven.py\n-SEVEN = 7\n+SEVEN = 8\n```\n"
        used = "```python\nfrom microvllm.kernels import seven\n```\n```python\nprint(seven.SEVEN, seven.__file__)\n```"
        assert checkout.follow(f"{written}{used}\n") == f"8 {checkout.root / 'kernels/seven.py'}\n"
        assert not (ROOT / "kernels/seven.py").exists()

    def test_what_is_marked_does_not_run(self, checkout):
        assert checkout.follow("```sh gpu\nfalse\n```\n```python network\n1 / 0\n```\n```text\nx\n```\n") == ""

    def test_an_edit_has_one_place(self):
        assert edited("a\nb\n\nc\n", " a\n-b\n+B\n\n@@\n+d\n c\n") == "a\nB\n\nd\nc\n"
        with pytest.raises(ValueError, match="2 times in the file"):
            edited("a\na\n", " a\n+b\n")
        with pytest.raises(ValueError, match="0 times in the file"):
            edited("a\n", "-b\n")
        with pytest.raises(ValueError, match="begins with a space"):
            edited("a\n", "a\n+b\n")
