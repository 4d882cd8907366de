"""Which implementation of each operator an engine runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from . import (
    advance_decode,
    append_attention,
    linear,
    linear_add,
    linear_add_norm,
    linear_swiglu,
    norm_gate_up_swiglu,
    norm_linear,
    norm_qkv_rotary_store_kv,
    paged_attention,
    prefill_attention,
    rms_norm,
    rotary,
    rotary_store_kv,
    sampling,
    swiglu,
)
from .op import COMPOSED, REFERENCE, Implementation, Op


def _by_name(ops: Iterable[Op]) -> Mapping[str, Op]:
    return MappingProxyType({op.name: op for op in ops})


OPS: Mapping[str, Op] = _by_name(
    (
        rms_norm.OP,
        linear.OP,
        rotary_store_kv.OP,
        paged_attention.OP,
        prefill_attention.OP,
        swiglu.OP,
        sampling.OP,
        norm_linear.OP,
        norm_qkv_rotary_store_kv.OP,
        append_attention.OP,
        linear_swiglu.OP,
        norm_gate_up_swiglu.OP,
        linear_add.OP,
        linear_add_norm.OP,
        advance_decode.OP,
    )
)
"""The operators that an engine runs, fused ones behind their parts."""

STANDALONE: Mapping[str, Op] = _by_name((rotary.OP, rms_norm.ADD_OP))
"""Operators that no engine runs: parts and comparisons."""

_IN_PLACE_OF = {
    "add_rms_norm": "linear_add_norm, which contains it",
    "rotary": "rotary_store_kv, which contains it",
}


Choice = tuple[str, Implementation | None]
"""The name and the implementation that an operator runs; (COMPOSED, None) for a fused one that is composed."""


class KernelSet:
    """One implementation for each operator; `kernels.rms_norm(x, weight, eps)` calls the chosen one.

    A fused operator (`Op.parts`) may also be composed: it then calls those of its parts. So it is where no fused
    implementation runs, where one is made for fewer rows, and where a part has been replaced.

    It cannot change: a captured CUDA graph would ignore a later swap. `replace` makes another.
    """

    def __init__(self, chosen: Mapping[str, Choice]):
        assert chosen.keys() == OPS.keys()
        object.__setattr__(self, "_chosen", MappingProxyType(dict(chosen)))
        for op in OPS.values():
            object.__setattr__(self, op.name, self._function(op))

    def _function(self, op: Op) -> Callable:
        name, implementation = self._chosen[op.name]
        if implementation is None:
            return op.compose(self)
        if implementation.most_rows is None:
            return implementation.function
        if part := _that_prepares(op, self._chosen):
            raise ValueError(
                f"{op.name}={name!r} does not go with {part}={self._chosen[part][0]!r}, which computes its larger "
                f"batches and wants weights in a layout of its own: choose another {part}, or {op.name}={COMPOSED!r}"
            )
        function, composition, most_rows = implementation.function, op.compose(self), implementation.most_rows

        def run(x: torch.Tensor, *rest: Any, **options: Any) -> Any:
            return (function if len(x) <= most_rows else composition)(x, *rest, **options)

        return run

    def __setattr__(self, name, value):
        raise AttributeError(f"a KernelSet cannot change; use kernels.replace({name}=...)")

    def runs(self, part: str, of: str, rows: int) -> bool:
        """Whether the fused operator `of` calls its part, or a part's part, by itself for so many rows: it is composed
        then, and so is whatever stands between the two.
        """
        implementation = self._chosen[of][1]
        if implementation is not None and (implementation.most_rows is None or rows <= implementation.most_rows):
            return False
        return any(own == part or self.runs(part, own, rows) for own in OPS[of].parts)

    @property
    def names(self) -> Mapping[str, str]:
        """The name of the implementation that each operator runs."""
        return MappingProxyType({op: name for op, (name, _) in self._chosen.items()})

    def changes(self, other: KernelSet) -> dict[str, tuple[str, str]]:
        """The operators that the other set runs otherwise → the name here and the name there."""
        pairs = {op: (choice, other._chosen[op]) for op, choice in self._chosen.items()}
        return {op: (mine[0], theirs[0]) for op, (mine, theirs) in pairs.items() if mine != theirs}

    def preparation(self, op: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What brings a weight into the layout that runs for `op`; None where that is the canonical one."""
        implementation = self._chosen[op][1]
        if implementation is None:
            part = _that_prepares(OPS[op], self._chosen)
            return None if part is None else self.preparation(part)
        return implementation.prepare

    def prepare(self, op: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight as what runs for `op` wants it; the same tensor where that is the canonical layout."""
        preparation = self.preparation(op)
        return weight if preparation is None else preparation(weight)

    @classmethod
    def default(cls, device: str | torch.device | None = None) -> KernelSet:
        """The preferred implementation of each operator that runs on `device` (default: the GPU if there is one)."""
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen: dict[str, Choice] = {}
        for op in OPS.values():
            chosen[op.name] = _choose(op, COMPOSED if _that_prepares(op, chosen) else op.default(device))
        return cls(chosen)

    @classmethod
    def reference(cls) -> KernelSet:
        """The plain PyTorch reference of every operator."""
        return cls({op.name: _choose(op, REFERENCE) for op in OPS.values()})

    def replace(self, **swaps: str | Callable) -> KernelSet:
        """A KernelSet with some operators swapped, each for an implementation's name or for any callable.

        A fused operator with a part among them is composed, so that the part runs, unless it is among them itself.
        A callable gets weights in their canonical layout. ValueError for an operator or an implementation that does not
        exist or that no engine runs, and for a fused implementation beside a part that shares its weight and wants it
        in another layout.
        """
        chosen, changed = dict(self._chosen), set(swaps)
        for op in OPS.values():
            if not changed.isdisjoint(op.parts):
                chosen[op.name] = _choose(op, COMPOSED)
                changed.add(op.name)
        for op, swap in swaps.items():
            if op in STANDALONE:
                raise ValueError(f"no engine runs the operator {op!r}; it runs {_IN_PLACE_OF[op]}")
            if op not in OPS:
                raise ValueError(f"there is no operator {op!r}; there are: {', '.join(OPS)}")
            if isinstance(swap, str):
                chosen[op] = _choose(OPS[op], swap)
            elif callable(swap):
                chosen[op] = (getattr(swap, "__qualname__", repr(swap)), Implementation(swap))
            else:
                raise ValueError(f"{op}={swap!r} is neither an implementation's name nor a callable")
        return KernelSet(chosen)

    def check_device(self, device: torch.device) -> None:
        """ValueError where an implementation that is chosen cannot run on `device`."""
        for op, (name, implementation) in self._chosen.items():
            if implementation is not None and (reason := implementation.cannot_run(device)) is not None:
                raise ValueError(
                    f"{op}={name!r} cannot run on {device}: {reason}; choose another, such as "
                    f"{op}={OPS[op].default(device)!r}"
                )

    def wrapped(self, wrap: Callable[[str, Callable], Callable]) -> KernelSet:
        """The same implementations, each called through wrap(its operator's name, its function)."""

        def through(op: str, it: Implementation | None) -> Implementation | None:
            return it and replace(it, function=wrap(op, it.function))

        return KernelSet({op: (name, through(op, it)) for op, (name, it) in self._chosen.items()})

    def __str__(self) -> str:
        by_name: dict[str, list[str]] = {}
        for op, (name, implementation) in self._chosen.items():
            if implementation is not None and implementation.most_rows is not None:
                name += f" (most_rows={implementation.most_rows}, else {COMPOSED})"
            by_name.setdefault(name, []).append(op)
        return "; ".join(f"{name}: {', '.join(ops)}" for name, ops in by_name.items())

    def __repr__(self) -> str:
        return f"KernelSet({self})"


def _choose(op: Op, name: str) -> Choice:
    if name == COMPOSED and op.parts:
        return name, None
    implementation = op.choose(name)
    if implementation.unfit is not None:
        raise ValueError(f"no engine can run {op.name}={name!r}: {implementation.unfit}")
    return name, implementation


def _that_prepares(op: Op, chosen: Mapping[str, Choice]) -> str | None:
    """The part of a fused operator, or of one that is composed itself, that wants its weight in a layout of its own."""
    for part in op.parts:
        implementation = chosen[part][1]
        found = _that_prepares(OPS[part], chosen) if implementation is None else implementation.prepare and part
        if found:
            return found
    return None
