"""The operators under test: those that an engine runs, and those that stand alone."""

from __future__ import annotations

from microvllm.kernels.kernel_set import OPS, STANDALONE
from microvllm.kernels.op import Op

OPERATORS: dict[str, Op] = {**OPS, **STANDALONE}
