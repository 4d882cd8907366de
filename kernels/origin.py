"""Where a figure comes from: all that is needed to take it again."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("micro-vllm", "torch", "triton", "transformers", "flash-attn", "vllm", "flashinfer-python")
CHECKOUT = Path(__file__).parents[1]


def origin() -> dict[str, Any]:
    """The date, the device, the versions of what is installed, the commit and the command."""
    return {
        "date": date.today().isoformat(),
        "device": device_name(),
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
        "commit": _commit(),
        "command": _command(),
    }


def device_name(device: torch.device | None = None) -> str:
    """The GPU's name or the processor's; default that of the GPU if there is one."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _command() -> str:
    main = sys.modules["__main__"]
    if main.__spec__ is not None:
        return shlex.join(["python", "-m", main.__spec__.name, *sys.argv[1:]])
    if not hasattr(main, "__file__"):
        return "in a notebook or an interactive session"
    program = Path(sys.argv[0])
    return shlex.join([*(["python", str(program)] if program.suffix else [program.name]), *sys.argv[1:]])


def _commit() -> str:
    """The checkout's commit; a copy of it without git is told by the environment variable MICROVLLM_COMMIT."""
    if told := os.environ.get("MICROVLLM_COMMIT"):
        return told

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True, text=True).stdout.strip()

    if not (CHECKOUT / ".git").exists():  # installed, perhaps inside somebody else's checkout
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")
