"""What is set before any test file is imported, and a fixture that two of them share."""

from __future__ import annotations

import os

# Read when torch is imported, here and in every process that a test starts. The tests' models are too small for a
# second thread to help much, and threads wait for each other by spinning: beside other work a step takes ten times as
# long.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

# Triton decides when a kernel is defined whether its interpreter will run it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from microvllm.kernels import paged_attention

from .interpreter import patch_once_a_launch

patch_once_a_launch()


@pytest.fixture
def few_programs(monkeypatch):
    """Decode attention starts more programs than the cases have chunks, and an idle one takes the interpreter 5 ms.
    With its own launches it is in test_paged_attention.
    """
    chosen = paged_attention._launch

    def launch(*sizes: int) -> dict[str, int]:
        launch = chosen(*sizes)
        return launch | {"chunks": min(launch["chunks"], 48)}

    monkeypatch.setattr(paged_attention, "_launch", launch)
