"""Memory that shows what a kernel did not write, read before it wrote, or wrote out of bounds.

Unwritten memory holds poison: NaN, for integers their minimum. In a repeated call it is a finite number, for
integers the next one; where NaN has become that, the kernel wrote nothing.
"""

from __future__ import annotations

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MARGIN = 4096  # elements of poison before and behind a tensor: more than the last block of a row reaches beyond it


def poison(dtype: torch.dtype, repeated: bool) -> float | int:
    if dtype.is_floating_point:
        return -96.0 if repeated else math.nan  # float8 has both
    return int(repeated) if dtype == torch.bool else torch.iinfo(dtype).min + repeated


def is_poison(x: torch.Tensor, repeated: bool) -> torch.Tensor:
    value = poison(x.dtype, repeated)
    return x.isnan() if value != value else x == value


def poisoned_like(x: torch.Tensor, repeated: bool) -> torch.Tensor:
    """Poison in the shape, strides and alignment of x, and around it."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    start = MARGIN + x.storage_offset() % MARGIN
    memory = torch.empty(start + extent + MARGIN, dtype=x.dtype, device=x.device)
    return memory.fill_(poison(x.dtype, repeated)).as_strided(x.shape, x.stride(), start)


def copy_amid_poison(x: torch.Tensor, repeated: bool) -> torch.Tensor:
    """A copy of x with its strides and alignment, and poison between and around its elements."""
    if x.numel() == 0:
        return x.clone()
    copy = poisoned_like(x, repeated)
    once(copy).copy_(once(x))
    return copy


def moved_to(place: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """x, which is from `copy_amid_poison`, at the place of a copy from there, if that is as large; else where it is."""
    same = place is not None and place.dtype == x.dtype and place.stride() == x.stride() and place.shape == x.shape
    if not same or place.storage_offset() != x.storage_offset() or x.numel() == 0:
        return x
    _memory(place).copy_(_memory(x))
    return place


def bounds_kept(x: torch.Tensor, repeated: bool) -> bool:
    """Whether there still is poison between and around the elements of a tensor from one of the functions here."""
    return x.numel() == 0 or torch.equal(_memory(x), _memory(copy_amid_poison(x, repeated)))


class PoisonedAllocations(TorchDispatchMode):
    """Within it, what torch.empty and its kin return is poisoned, and kept in `allocated`."""

    FUNCTIONS = tuple(
        getattr(torch.ops.aten, name)
        for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    )

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile compiles within it, which within other modes it silently does not."""
        return True

    def __init__(self, repeated: bool):
        super().__init__()
        self.repeated = repeated
        self.allocated: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket not in self.FUNCTIONS or result.numel() == 0 or (kwargs or {}).get("pin_memory"):
            return result
        self.allocated.append(poisoned_like(result, self.repeated))
        return self.allocated[-1]


def once(x: torch.Tensor) -> torch.Tensor:
    """x with each dimension that repeats the same memory, an expanded one, cut to one repetition."""
    for dim, stride in enumerate(x.stride()):
        x = x.narrow(dim, 0, 1) if stride == 0 else x
    return x


def _memory(x: torch.Tensor) -> torch.Tensor:
    """All bytes of the storage that x is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
