"""Tensors on their way from the device to the host, while the device goes on."""

from __future__ import annotations

from functools import cache

import torch


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
