"""An operator: one mathematical function on tensors, its reference in PyTorch, and its implementations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

REFERENCE = "reference"


def _runs_anywhere(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    function:     takes what the operator's reference takes and returns what it returns
    unavailable:  given a device, says in words why the implementation cannot run there, or None where it can
    prepare:      given a weight in its one canonical layout, returns it in the layout that `function` wants; it is
                  called once for each weight when a model is loaded, and the canonical one is then dropped
    """

    function: Callable
    unavailable: Callable[[torch.device], str | None] = _runs_anywhere
    prepare: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class Op:
    """An operator's name, its reference, and its other implementations by name, the preferred one first."""

    name: str
    reference: Callable
    implementations: Mapping[str, Implementation] = field(default_factory=dict)

    def choose(self, name: str) -> Implementation:
        """The implementation called `name`; ValueError with the names there are."""
        if name == REFERENCE:
            return Implementation(self.reference)
        if name not in self.implementations:
            known = ", ".join([*self.implementations, REFERENCE])
            raise ValueError(f"operator {self.name} has no implementation {name!r}; it has: {known}")
        return self.implementations[name]

    def unavailable(self, name: str, device: torch.device) -> str | None:
        """Why the implementation called `name` cannot run on `device`, None where it can; the reference always can."""
        return None if name == REFERENCE else self.implementations[name].unavailable(device)

    def default(self, device: torch.device) -> str:
        """The name of the first implementation that can run on `device`, else the reference."""
        return next((name for name in self.implementations if self.unavailable(name, device) is None), REFERENCE)
