"""A measurement as a file: rows, and all that is needed to take it again."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PEERS = ("torch", "triton", "transformers", "flash-attn", "vllm", "flashinfer-python")


def device_name() -> str:
    """The GPU's name, else the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def save(name: str, rows: list[dict[str, Any]], **about: Any) -> Path:
    """Writes bench/results/<gpu or cpu>/<name>.json: the rows, what they are about, and how to take them again."""
    folder = RESULTS / (
        re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()) if torch.cuda.is_available() else "cpu"
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    record = {
        **about,
        "date": date.today().isoformat(),
        "device": device_name(),
        "python": platform.python_version(),
        "versions": {package: found for package in PEERS if (found := _version(package))},
        "commit": _commit(),
        "command": _command(),
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; numbers to three significant digits."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)] + [[_cell(row[column]) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _command() -> str:
    module = sys.modules["__main__"].__spec__  # None for a script
    return shlex.join(["python", "-m", module.name, *sys.argv[1:]] if module else ["python", *sys.argv])


def _commit() -> str:
    """The checkout's commit; a copy of it without git is told by the environment variable MICROVLLM_COMMIT."""
    if told := os.environ.get("MICROVLLM_COMMIT"):
        return told

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")
