"""compute-sanitizer finds no access out of bounds and no misaligned one in any Triton kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from microvllm.kernels.op import needs_gpu

from ..operators import OPERATORS

SANITIZER = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
SCRIPT = Path(__file__).with_name("sanitize.py")


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
def test_memcheck_finds_nothing_in_any_kernel():
    result = subprocess.run(
        [SANITIZER, "--error-exitcode", "1", sys.executable, SCRIPT],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0 and "ERROR SUMMARY: 0 errors" in result.stdout, result.stdout + result.stderr
    for op in OPERATORS.values():
        for name, implementation in op.implementations.items():
            if implementation.unavailable is needs_gpu:
                assert f"{op.name} {name}: " in result.stdout
