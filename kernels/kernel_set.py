"""Which implementation of each operator an engine runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import torch

from . import (
    advance_decode,
    append_attention,
    linear,
    paged_attention,
    prefill_attention,
    rms_norm,
    rotary,
    rotary_store_kv,
    sampling,
    swiglu,
)
from .op import REFERENCE, Implementation, Op


def _by_name(ops: Iterable[Op]) -> Mapping[str, Op]:
    return MappingProxyType({op.name: op for op in ops})


OPS: Mapping[str, Op] = _by_name(
    (
        rms_norm.OP,
        rms_norm.ADD_OP,
        linear.OP,
        rotary_store_kv.OP,
        paged_attention.OP,
        prefill_attention.OP,
        swiglu.OP,
        sampling.OP,
        advance_decode.OP,
    )
)
"""The operators that an engine runs."""

STANDALONE: Mapping[str, Op] = _by_name((rotary.OP, append_attention.OP))
"""Operators that no engine runs: parts and comparisons."""

_IN_PLACE_OF = {
    "rotary": "rotary_store_kv, which contains it",
    "append_attention": "rotary_store_kv and paged_attention, which together are it",
}


class KernelSet:
    """One implementation for each operator; `kernels.rms_norm(x, weight, eps)` calls the chosen one.

    It cannot change: a captured CUDA graph would ignore a later swap. `replace` makes another.
    """

    def __init__(self, chosen: Mapping[str, tuple[str, Implementation]]):
        assert chosen.keys() == OPS.keys()
        for op, (_, implementation) in chosen.items():
            object.__setattr__(self, op, implementation.function)
        object.__setattr__(self, "_chosen", MappingProxyType(dict(chosen)))

    def __setattr__(self, name, value):
        raise AttributeError(f"a KernelSet cannot change; use kernels.replace({name}=...)")

    @property
    def names(self) -> Mapping[str, str]:
        """The name of the implementation that each operator runs."""
        return MappingProxyType({op: name for op, (name, _) in self._chosen.items()})

    def prepare(self, op: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight as the implementation of `op` wants it; the same tensor where that is the canonical layout."""
        prepare = self._chosen[op][1].prepare
        return weight if prepare is None else prepare(weight)

    @classmethod
    def default(cls, device: str | torch.device | None = None) -> KernelSet:
        """The preferred implementation of each operator that runs on `device` (default: the GPU if there is one)."""
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        names = {op.name: op.default(device) for op in OPS.values()}
        return cls({op: (name, OPS[op].choose(name)) for op, name in names.items()})

    @classmethod
    def reference(cls) -> KernelSet:
        """The plain PyTorch reference of every operator."""
        return cls({op.name: (REFERENCE, op.choose(REFERENCE)) for op in OPS.values()})

    def replace(self, **swaps: str | Callable) -> KernelSet:
        """A KernelSet with some operators swapped, each for an implementation's name or for any callable.

        A callable gets weights in their canonical layout. ValueError for an operator or an implementation that does not
        exist, and for an operator that no engine runs.
        """
        chosen = dict(self._chosen)
        for op, swap in swaps.items():
            if op in STANDALONE:
                raise ValueError(f"no engine runs the operator {op!r}; it runs {_IN_PLACE_OF[op]}")
            if op not in OPS:
                raise ValueError(f"there is no operator {op!r}; there are: {', '.join(OPS)}")
            if isinstance(swap, str):
                chosen[op] = (swap, OPS[op].choose(swap))
            elif callable(swap):
                chosen[op] = (getattr(swap, "__qualname__", repr(swap)), Implementation(swap))
            else:
                raise ValueError(f"{op}={swap!r} is neither an implementation's name nor a callable")
        return KernelSet(chosen)

    def __str__(self) -> str:
        by_name: dict[str, list[str]] = {}
        for op, name in self.names.items():
            by_name.setdefault(name, []).append(op)
        return "; ".join(f"{name}: {', '.join(ops)}" for name, ops in by_name.items())

    def __repr__(self) -> str:
        return f"KernelSet({self})"
