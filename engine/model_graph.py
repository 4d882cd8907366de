"""The decode step as CUDA graphs: one launch from the token that goes in to the token that is drawn."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from tqdm import tqdm

from ..model.qwen2 import LayerCache, Qwen2
from ..model.sampler import Sampler
from .model_runner import ModelRunner
from .sequence import Sequence


def bucket_sizes(max_batch_size: int) -> list[int]:
    """The batch sizes that are captured: a decode runs in the least that holds it, its other rows being padded.

    Up to 8 each is twice the last one: the weights are read in the same time for all of these. Up to 64 they grow by 8,
    up to 128 by 16, and by 32 from there on, so that fewer rows than that are padded. A padded row costs its share of
    the head's product and of the draw, and no attention. `max_batch_size` always has its own.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_batch_size, 32)]
    return [size for size in sizes if size < max_batch_size] + [max_batch_size]


class CapturedCall:
    """A call as a CUDA graph; `outputs` is what it returned, and where each replay writes.

    It is called once before it is captured: that compiles kernels and makes what libraries make once for a stream.
    """

    def __init__(self, call: Callable[[], Any], pool: tuple[int, int] | None = None):
        self._graph = torch.cuda.CUDAGraph()
        stream = _capture_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
            stream.synchronize()
            # Not torch.cuda.graph, which collects garbage and empties the allocator's cache each time: 0.2 s.
            self._graph.capture_begin(pool=pool)
            try:
                self.outputs = call()
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    @property
    def pool(self) -> tuple[int, int]:
        """Its memory, which another graph may share that does not run at the same time."""
        return self._graph.pool()

    def replay(self) -> None:
        self._graph.replay()


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for all captures: libraries hold memory for every stream they have seen."""
    return torch.cuda.Stream(device)


class ModelGraphRunner(ModelRunner):
    """A ModelRunner whose decodes replay CUDA graphs. ValueError where an operator cannot be captured.

    The graphs share one memory pool: they run one after the other, and what one leaves is read before the next begins.

    progress: whether to show a progress bar, on standard error
    """

    def __init__(
        self, model: Qwen2, sampler: Sampler, cache: list[LayerCache], max_batch_size: int, *, progress: bool = False
    ):
        super().__init__(model, sampler, cache, max_batch_size)
        self._buckets = bucket_sizes(max_batch_size)
        self._graphs: dict[int, CapturedCall] = {}
        # The largest comes first: the others find room in what it has taken from the pool.
        for size in tqdm(
            self._buckets[::-1], desc="Capturing decode", unit="graph", disable=None if progress else True
        ):
            self._graphs[size] = self._capture(size)

    @torch.inference_mode()
    def _capture(self, size: int) -> CapturedCall:
        columns = self.rows.columns(size)
        pool = next(iter(self._graphs.values())).pool if self._graphs else None
        try:
            return CapturedCall(lambda: self._decode_step(size, columns), pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"a decode of {size} sequences cannot be captured in a CUDA graph with these kernels "
                f"({self.model.kernels}): {error}; choose others, or enforce_eager=True"
            ) from error

    def _size(self, count: int) -> int:
        return self._buckets[bisect_left(self._buckets, count)]

    def _compute_rows(self, seqs: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        graph = self._graphs[self._size(len(seqs))]
        graph.replay()
        return graph.outputs
