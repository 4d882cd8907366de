"""Exponentials are computed as powers of two, for which a GPU has an instruction: e^x is 2^(x · log2 e)."""

from __future__ import annotations

import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
