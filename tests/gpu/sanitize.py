"""Runs every Triton kernel once on the small cases of its operator, for compute-sanitizer to watch:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 python tests/gpu/sanitize.py [operator ...]

Without the caching every tensor is an allocation of its own, and the sanitizer sees where it ends. `Op.check` is not
used: it puts a margin around each tensor.
"""

from __future__ import annotations

import sys

import torch
from microvllm.kernels.kernel_set import OPS, STANDALONE
from microvllm.kernels.op import Case, Op, needs_gpu

OPERATORS = {**OPS, **STANDALONE}
_BATCHES = tuple(
    Case(batch=batch, context=700, shortest=1, heads=8, kv_heads=4, head_dim=64, block_size=16, padded=3)
    for batch in (20, 70)
)
LARGER = {
    "linear_swiglu": tuple(Case(tokens=tokens, intermediate=18944, inputs=512) for tokens in (40, 100, 700)),
    "paged_attention": _BATCHES,
    "append_attention": _BATCHES,
}
"""Cases that are launched otherwise than the small ones, among which the interpreter would take too long for them."""


def run(op: Op) -> None:
    dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
    for name, implementation in op.implementations.items():
        for case in (*op.cases, *LARGER.get(op.name, ())) if implementation.unavailable is needs_gpu else ():
            generator = torch.Generator("cuda").manual_seed(0)
            inputs = op.inputs(**case.sizes, dtype=dtype, device=torch.device("cuda"), generator=generator)
            if implementation.refuses is not None and implementation.refuses(**inputs):
                continue
            if implementation.prepare is not None:
                inputs["weight"] = implementation.prepare(inputs["weight"])
            implementation.function(**inputs)
            torch.cuda.synchronize()
            print(f"{op.name} {name}: {case}", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or OPERATORS:
        run(OPERATORS[name])
