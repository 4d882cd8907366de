"""A model's calls of its operators, watched: a KernelSet that tells an observer of each, and what each must cost."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, Protocol

import torch
from microvllm.kernels.kernel_set import OPS, KernelSet
from microvllm.kernels.op import Cost, Op


class Observer(Protocol):
    def begins(self, op: str, args: tuple, kwargs: Mapping[str, Any]) -> None: ...

    def ends(self, op: str) -> None: ...


class WatchedKernels:
    """`kernels` computes what the given KernelSet does and tells `observer` of each call, while there is one.

    A fused operator that is composed is seen as its parts. A captured CUDA graph calls no Python: its replays are seen
    by no observer.
    """

    def __init__(self, kernels: KernelSet):
        self.observer: Observer | None = None
        self.kernels = kernels.wrapped(self._watched)

    def _watched(self, op: str, function: Callable) -> Callable:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            observer = self.observer
            if observer is None:
                return function(*args, **kwargs)
            observer.begins(op, args, kwargs)
            result = function(*args, **kwargs)
            observer.ends(op)
            return result

        return call


class CallCosts:
    """Observes what each operator is asked for: the costs of its calls, None for one whose sizes are not known."""

    def __init__(self):
        self.of: dict[str, list[Cost | None]] = {}

    def begins(self, op: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self.of.setdefault(op, []).append(call_cost(OPS[op], *args, **kwargs))

    def ends(self, op: str) -> None:
        pass


def call_cost(op: Op, *args: Any, **kwargs: Any) -> Cost | None:
    """The cost of a call with these arguments by the operator's own `cost`; None for an operator that SIZES lacks.

    Where a size is in a tensor, as attention's context lengths are, this waits for the device.
    """
    if op.name not in SIZES:
        return None
    call = inspect.signature(op.reference).bind(*args, **kwargs)
    call.apply_defaults()
    itemsize = next(x for x in call.arguments.values() if isinstance(x, torch.Tensor)).dtype.itemsize
    return total(op.cost(**sizes, itemsize=itemsize) for sizes in SIZES[op.name](**call.arguments))


def total(costs: Iterable[Cost]) -> Cost:
    costs = list(costs)
    return Cost(sum(c.read for c in costs), sum(c.written for c in costs), sum(c.flops for c in costs))


Sizes = list[dict[str, Any]]
"""Of one call: what its operator's `cost` takes. The costs of several add up to that of the call."""


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> Sizes:
    return [{"tokens": x.numel() // len(weight), "hidden": len(weight)}]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Sizes:
    return [{"rows": len(x), "outputs": weight.shape[0], "inputs": weight.shape[1], "bias": bias is not None}]


def _norm_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **rest: Any) -> Sizes:
    return [{"tokens": len(x), "outputs": weight.shape[0], "inputs": weight.shape[1], "bias": bias is not None}]


def _norm_qkv_rotary_store_kv(
    x: torch.Tensor, bias: torch.Tensor | None, k_cache: torch.Tensor, heads: int, **rest: Any
) -> Sizes:
    _, block_size, kv_heads, head_dim = k_cache.shape
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block_size": block_size}
    return [{"tokens": len(x), "inputs": x.shape[1], **shape, "bias": bias is not None}]


def _linear_swiglu(x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> Sizes:
    return [{"tokens": len(x), "intermediate": weight.shape[0] // 2, "inputs": weight.shape[1]}]


def _linear_add(x: torch.Tensor, weight: torch.Tensor, **rest: Any) -> Sizes:
    return [{"rows": len(x), "outputs": weight.shape[0], "inputs": weight.shape[1]}]


def _linear_add_norm(norm_weight: torch.Tensor | None, **call: Any) -> Sizes:
    return [sizes | {"norm": norm_weight is not None} for sizes in _linear_add(**call)]


def _rotary_store_kv(q: torch.Tensor, k: torch.Tensor, k_cache: torch.Tensor, **rest: Any) -> Sizes:
    tokens, heads, head_dim = q.shape
    shape = {"heads": heads, "kv_heads": k.shape[1], "head_dim": head_dim, "block_size": k_cache.shape[1]}
    return [{"tokens": tokens, **shape}]


def _paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, context_lens: torch.Tensor, k_scale: torch.Tensor | None, **rest: Any
) -> Sizes:
    """A call for each sequence: their contexts differ as they like."""
    _, block_size, kv_heads, head_dim = k_cache.shape
    shape = {"heads": q.shape[1], "kv_heads": kv_heads, "head_dim": head_dim, "block_size": block_size}
    return [{"batch": 1, "context": n, **shape, "float8": k_scale is not None} for n in context_lens.tolist()]


def _append_attention(q: torch.Tensor, k_cache: torch.Tensor, context_lens: torch.Tensor, **rest: Any) -> Sizes:
    """As `_paged_attention`; a row without a context appends nothing."""
    _, block_size, kv_heads, head_dim = k_cache.shape
    shape = {"heads": q.shape[1], "kv_heads": kv_heads, "head_dim": head_dim, "block_size": block_size}
    contexts = context_lens.tolist()
    return [{"batch": min(n, 1), "padded": 1 - min(n, 1), "context": n, **shape} for n in contexts]


def _swiglu(gate_up: torch.Tensor) -> Sizes:
    return [{"tokens": len(gate_up), "intermediate": gate_up.shape[1] // 2}]


def _sample(logits: torch.Tensor, **rest: Any) -> Sizes:
    rows, vocab = logits.shape
    return [{"rows": rows, "vocab": vocab, "kind": "", "shape": ""}]  # neither changes what is read


def _advance_decode(drawn: torch.Tensor, block_table: torch.Tensor, block_size: int, **rest: Any) -> Sizes:
    return [{"rows": len(drawn), "block_size": block_size, "max_blocks": block_table.shape[1]}]


SIZES: Mapping[str, Callable[..., Sizes]] = {
    "rms_norm": _rms_norm,
    "linear": _linear,
    "norm_linear": _norm_linear,
    "norm_qkv_rotary_store_kv": _norm_qkv_rotary_store_kv,
    "linear_swiglu": _linear_swiglu,
    "norm_gate_up_swiglu": _linear_swiglu,
    "linear_add": _linear_add,
    "linear_add_norm": _linear_add_norm,
    "rotary_store_kv": _rotary_store_kv,
    "paged_attention": _paged_attention,
    "append_attention": _append_attention,
    "swiglu": _swiglu,
    "sample": _sample,
    "advance_decode": _advance_decode,
}
"""By operator: from the arguments of a call, by the names that its reference has for them, to its sizes."""
