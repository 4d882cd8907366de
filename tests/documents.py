"""The code blocks of README.md and docs/: what each is, and how it is run.

The word after the three backticks says what a block is, and the word behind it what becomes of it:

    python          runs. Blocks with no other code between them are one session
    python PATH     is a file of the checkout, and written there
    diff PATH       is an edit of a file of the checkout: lines with + come, with - go, others are there once
    sh              runs, in the checkout
    text            is no code
    … MARK          does not run here: gpu and network need one, server is run by the tests in tests/server
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKS = ("gpu", "network", "server")
KINDS = (
    "python",
    "python PATH",
    "diff PATH",
    "sh",
    "text",
    *(f"{code} {mark}" for code in ("python", "sh") for mark in MARKS),
)
FENCED = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
TIMEOUT = 600


@dataclass(frozen=True)
class Block:
    """line: of the document, where the code begins.   info: what stands behind the three backticks"""

    line: int
    info: str
    code: str

    @property
    def path(self) -> str | None:
        """Of the file that the block writes or edits."""
        language, _, word = self.info.partition(" ")
        return word if language in ("python", "diff") and re.fullmatch(r"[\w./-]+\.\w+", word) else None

    @property
    def kind(self) -> str:
        return self.info if self.path is None else f"{self.info.split()[0]} PATH"


def blocks(text: str) -> list[Block]:
    """Those of a document. ValueError for one of no known kind."""
    found = [Block(text.count("\n", 0, m.start()) + 2, m[1].strip(), m[2]) for m in FENCED.finditer(text)]
    for block in found:
        if block.kind not in KINDS:
            raise ValueError(f"line {block.line}: {block.info!r} is none of {', '.join(KINDS)}")
    return found


def marked(path: Path, info: str, word: str) -> str:
    """The code of the one block of a document with this info string and this word in it."""
    (code,) = (block.code for block in blocks(path.read_text()) if block.info == info and word in block.code)
    return code


def edited(text: str, diff: str) -> str:
    """The text with the edits of a diff, which lines of @@ part. ValueError for what is not in the text once."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        lines = [line or " " for line in hunk.splitlines()]
        if strange := [line for line in lines if line[0] not in " +-"]:
            raise ValueError(f"a line of a diff begins with a space, + or -, and not as {strange[0]!r}")
        before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in signs) for signs in (" -", " +"))
        if text.count(before) != 1:
            raise ValueError(f"{text.count(before)} times in the file, and not once:\n{before}")
        text = text.replace(before, after)
    return text


class Checkout:
    """A copy of this checkout in `folder`, for a document to be followed in."""

    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder / "microvllm"
        names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build")
        for name in sorted(names):
            source, target = ROOT / name, self.root / name
            self.root.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=ignored)
            else:
                shutil.copy(source, target)

    def follow(self, text: str, name: str = "document.md") -> str:
        """What the blocks of a document print. AssertionError for one that fails, with what it printed."""
        printed, session = "", ""
        for block in blocks(text):
            if block.info == "python":
                # Each line at its own number, so that a traceback names the document's.
                session += "\n" * (block.line - 1 - session.count("\n")) + block.code
            elif block.kind in ("sh", "python PATH", "diff PATH"):
                printed, session = printed + self._python(session, name), ""
                if block.info == "sh":
                    printed += self._run(["bash", "-euo", "pipefail", "-c", block.code])
                else:
                    self._change(block)
        return printed + self._python(session, name)

    def _change(self, block: Block) -> None:
        path = self.root / block.path
        path.write_text(block.code if block.kind == "python PATH" else edited(path.read_text(), block.code))

    def _python(self, session: str, name: str) -> str:
        if not session:
            return ""
        script = self.folder / name  # a file, because Triton reads a kernel's source
        script.write_text(session)
        return self._run([sys.executable, str(script)])

    def _run(self, command: list[str]) -> str:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            command,
            cwd=self.root,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(self.folder), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
        if done.returncode:
            raise AssertionError(f"{command[-1]}\nexit code {done.returncode}\n{done.stdout}")
        return done.stdout
