"""An operator: one mathematical function on tensors, its reference in PyTorch, and its implementations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .measurement import Measurement
    from .report import Report

REFERENCE = "reference"
COMPOSED = "composed"


def runs_anywhere(device: torch.device) -> str | None:
    return None


def needs_gpu(device: torch.device) -> str | None:
    """Why a Triton kernel cannot run on `device`; on a CPU only Triton's interpreter runs it, which is for tests."""
    return None if device.type == "cuda" else "Triton compiles for a GPU"


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    function:     takes what the operator's reference takes and returns what it returns
    unavailable:  given a device, says in words why the implementation cannot run there, or None where it can
    prepare:      given a weight in its one canonical layout, returns it in the layout that `function` wants; it is
                  called once for each weight when a model is loaded, and the canonical one is then dropped
    refuses:      given a case's inputs, says in words why the implementation does not take them (a block size, a
                  dtype), or None where it does; `function` raises ValueError with these words for what it can see
                  without waiting for the GPU
    most_rows:    of a fused operator, the most rows of its first argument that `function` takes; a KernelSet composes
                  the operator's parts for more. None: any number
    unfit:        why no engine can run it, in words, though it can be checked and measured by itself; None: one can
    """

    function: Callable
    unavailable: Callable[[torch.device], str | None] = runs_anywhere
    prepare: Callable[[torch.Tensor], torch.Tensor] | None = None
    refuses: Callable[..., str | None] | None = None
    most_rows: int | None = None
    unfit: str | None = None

    def cannot_run(self, device: torch.device) -> str | None:
        """As `unavailable`, but where Triton's interpreter is on, which runs Triton kernels on a CPU."""
        interpreted = self.unavailable is needs_gpu and os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else self.unavailable(device)


@dataclass(frozen=True, init=False)
class Case:
    """The sizes of one call, by the names that the operator's `inputs` and `cost` take: Case(tokens=1, hidden=896)"""

    sizes: Mapping[str, Any]

    def __init__(self, **sizes: Any):
        object.__setattr__(self, "sizes", MappingProxyType(sizes))

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.sizes.items())

    def __repr__(self) -> str:
        return f"Case({', '.join(f'{name}={value!r}' for name, value in self.sizes.items())})"


@dataclass(frozen=True)
class Cost:
    """The least that a call must do: bytes read from memory, bytes written to it, floating-point operations."""

    read: int
    written: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Op:
    """An operator.

    reference:        the function in plain PyTorch, for anyone to check by eye, in the dtype of what it is given
    implementations:  the others by name, the preferred one first
    inputs:           inputs(**case.sizes, dtype, device, generator) → the arguments of one call by name, drawn from the
                      torch.Generator; what must not be read holds NaN or an invalid index
    cost:             cost(**case.sizes, itemsize) → Cost of the call with elements of `itemsize` bytes
    cases:            edge shapes, small enough for Triton's interpreter
    large_cases:      sizes of real models, for a GPU; the ones worth timing
    dtypes:           those it computes in
    mutates:          names of the arguments that a call changes in place
    parts:            of a fused operator, the operators that it is a composition of; its reference takes a function for
                      each by that name, by default the part's reference
    """

    name: str
    reference: Callable
    implementations: Mapping[str, Implementation] = field(default_factory=dict)
    inputs: Callable[..., dict[str, Any]] | None = None
    cost: Callable[..., Cost] | None = None
    cases: tuple[Case, ...] = ()
    large_cases: tuple[Case, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    mutates: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    def compose(self, kernels: Any) -> Callable:
        """A fused operator out of its parts, which are attributes of `kernels`, such as a KernelSet's."""
        return partial(self.reference, **{part: getattr(kernels, part) for part in self.parts})

    def choose(self, name: str) -> Implementation:
        """The implementation called `name`; ValueError with the names there are."""
        if name == REFERENCE:
            return Implementation(self.reference)
        if name not in self.implementations:
            known = ", ".join([*self.implementations, REFERENCE])
            known += f", and in a KernelSet {COMPOSED}" if self.parts else ""
            raise ValueError(f"operator {self.name} has no implementation {name!r}; it has: {known}")
        return self.implementations[name]

    def unavailable(self, name: str, device: torch.device) -> str | None:
        """Why the implementation called `name` cannot run on `device`, None where it can; the reference always can."""
        return None if name == REFERENCE else self.implementations[name].unavailable(device)

    def default(self, device: torch.device) -> str:
        """The name of the first implementation that an engine can run on `device`; else the reference, or for a fused
        operator the composition of its parts.
        """
        fit = (name for name, it in self.implementations.items() if it.unfit is None and it.unavailable(device) is None)
        return next(fit, COMPOSED if self.parts else REFERENCE)

    def check(self, kernel: str | Callable, cases: Iterable[Case] | None = None, **options: Any) -> Report:
        """Is it right? `kernel` is an implementation's name or any callable; see `check.check` for the options."""
        from .check import check

        return check(self, kernel, cases, **options)

    def measure(self, kernel: str | Callable, cases: Iterable[Case] | None = None, **options: Any) -> Measurement:
        """Is it fast? `kernel` is an implementation's name or any callable; see `measure.measure` for the options."""
        from .measure import measure

        return measure(self, kernel, cases, **options)
