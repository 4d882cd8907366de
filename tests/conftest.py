"""What is set before any test file is imported."""

from __future__ import annotations

import os

# Read when torch is imported, here and in every process that a test starts. The tests' models are too small for a
# second thread to help much, and threads wait for each other by spinning: beside other work a step takes ten times as
# long.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

# Triton decides when a kernel is defined whether its interpreter will run it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
