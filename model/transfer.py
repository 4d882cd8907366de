"""Tensors on their way between host and device, neither of which waits for the other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch


def to_device(values: Sequence | np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The values as a tensor on the device. Memory that is not pinned would be copied only when all is computed that
    was launched before."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    # Not torch.tensor(…, pin_memory=True), which refuses arrays.
    return torch.as_tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class HostCopy:
    """Copies tensors to the host as soon as they are computed, on a stream of its own; `wait` gives the copies.

    The next step need not be finished for that, though it was launched before anybody waited.
    """

    def __init__(self, *tensors: torch.Tensor):
        self._host, self._done = tensors, None
        device = tensors[0].device
        if device.type == "cuda":
            stream = _copy_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self._host = tuple(
                    torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors
                )
                for tensor in tensors:
                    tensor.record_stream(stream)
                self._done = stream.record_event()

    def wait(self) -> tuple[torch.Tensor, ...]:
        if self._done is not None:
            self._done.synchronize()
        return self._host
