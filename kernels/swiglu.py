"""SwiGLU (Shazeer 2020, arXiv:2002.05202, eq. 6), after the two products: silu(gate) · up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .base_two import LOG2_E
from .dependent_launch import allow_next, dependent_launch, wait_for_previous
from .op import Case, Cost, Implementation, Op, needs_gpu


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """y = silu(gate) · up, where gate and up are the halves of the last dimension.

    gate_up [tokens, 2·intermediate] → [tokens, intermediate]
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _swiglu_kernel(
    gate_up_ptr, y_ptr, stride_token, INTERMEDIATE: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    allow_next(DEPENDENT)
    # A row's programs run one behind the other, so that memory is read in long stretches. INTERMEDIATE is a constant,
    # because the division by a variable is slow and the loads would wait for it.
    BLOCKS: tl.constexpr = (INTERMEDIATE + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = column < INTERMEDIATE
    gate_row = gate_up_ptr + token * stride_token
    wait_for_previous(DEPENDENT)
    up = tl.load(gate_row + INTERMEDIATE + column, mask=mask, other=0.0)
    tl.debug_barrier()  # without it ptxas loads up where it is used: one latency after the other
    gate = tl.load(gate_row + column, mask=mask, other=0.0).to(tl.float32)
    # exp2 of a product is two instructions; tl.exp scales where it would underflow, which takes three more.
    y = gate / (1 + tl.exp2(gate * -LOG2_E)) * up.to(tl.float32)
    tl.store(y_ptr + token * INTERMEDIATE + column, y.to(y_ptr.dtype.element_ty), mask=mask)


def _launch(elements: int) -> dict[str, int]:
    """BLOCK and num_warps for so many elements of y: one load of each half a thread, of 8 bytes or 16.

    As many as are on the GPU at once are done soonest with the fewest instructions behind each load. `python -m
    bench.tune swiglu` sweeps others.
    """
    return {"BLOCK": 1024, "num_warps": 8 if elements <= 2**20 else 4}


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """As `swiglu_reference`, in float32 to the end and rounded once.

    ValueError for float64, for an odd last dimension and for one that is not contiguous.
    """
    if gate_up.dtype not in OP.dtypes:
        raise ValueError(f"gate_up is float16, bfloat16 or float32, not {gate_up.dtype}")
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(
            "gate_up is [tokens, 2·intermediate] with a contiguous last dimension, not "
            f"{list(gate_up.shape)} with strides {gate_up.stride()}"
        )
    tokens, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(tokens, intermediate, dtype=gate_up.dtype, device=gate_up.device)
    if y.numel() == 0:
        return y
    launch = _launch(y.numel()) | dependent_launch(gate_up.device)
    grid = (tokens * triton.cdiv(intermediate, launch["BLOCK"]),)
    _swiglu_kernel[grid](gate_up, y, gate_up.stride(0), INTERMEDIATE=intermediate, **launch)
    return y


def make_inputs(
    tokens: int, intermediate: int, *, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    gate_up = torch.randn(tokens, 2 * intermediate, dtype=torch.float32, device=device, generator=generator)
    return {"gate_up": (2 * gate_up).to(dtype)}


def cost(tokens: int, intermediate: int, *, itemsize: int) -> Cost:
    elements = tokens * intermediate
    return Cost(read=2 * elements * itemsize, written=elements * itemsize, flops=5 * elements)


OP = Op(
    "swiglu",
    reference=swiglu_reference,
    implementations={"triton": Implementation(swiglu, needs_gpu)},
    inputs=make_inputs,
    cost=cost,
    cases=(
        Case(tokens=1, intermediate=4864),
        Case(tokens=7, intermediate=96),
        Case(tokens=3, intermediate=1),
        Case(tokens=5, intermediate=1025),
        Case(tokens=300, intermediate=40),
        Case(tokens=0, intermediate=64),
    ),
    large_cases=tuple(
        Case(tokens=tokens, intermediate=intermediate)
        for intermediate in (18944, 4864)
        for tokens in (1, 8, 35, 128, 256, 4096)
    ),
)
