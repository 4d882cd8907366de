"""Decode steps and short prefills as CUDA graphs: each is one launch, and Python is slow at hundreds of them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from tqdm import tqdm

from ..model.qwen2 import LayerCache, Qwen2
from ..model.sampler import Sampler
from .chunk_rows import ChunkRows
from .model_runner import ModelRunner
from .scheduler import Chunk
from .sequence import Sequence


def bucket_sizes(max_batch_size: int) -> list[int]:
    """The batch sizes that are captured: a decode runs in the least that holds it, its other rows being padded.

    Up to 8 each is twice the last one: the weights are read in the same time for all of these. Up to 64 they grow by 8
    and by 16 from there on, so that fewer rows than that are padded. A padded row costs its share of the products and
    of the draw, and no attention. `max_batch_size` always has its own.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, max_batch_size, 16)]
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


PREFILL_TOKENS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
"""The token counts that a prefill is captured at. Reading the weights takes the longer part of each; past them, what
padded tokens compute."""
PREFILL_CHUNKS = 8
"""Prompts of a captured prefill at most."""


class ModelGraphRunner(ModelRunner):
    """A ModelRunner whose decodes and short prefills replay CUDA graphs.

    The graphs share one memory pool: they run one after the other, and what one leaves is read before the next begins.
    ValueError where an operator cannot be captured.

    progress: whether to show a progress bar, on standard error
    """

    def __init__(
        self, model: Qwen2, sampler: Sampler, cache: list[LayerCache], max_batch_size: int, *, progress: bool = False
    ):
        super().__init__(model, sampler, cache, max_batch_size)
        self._buckets = bucket_sizes(max_batch_size)
        max_blocks = -(-model.max_length // self.block_size)
        self._chunks = ChunkRows(PREFILL_TOKENS[-1], PREFILL_CHUNKS, max_blocks, self.block_size, self.device)
        self._decodes: dict[int, CapturedCall] = {}
        self._prefills: dict[int, CapturedCall] = {}
        self._pool: tuple[int, int] | None = None
        start = time.perf_counter()
        self._draw_in_float32(min(2, max_batch_size))
        # The largest come first: the others find room in what these have taken from the pool.
        sizes = [(self._decodes, n) for n in self._buckets[::-1]] + [(self._prefills, n) for n in PREFILL_TOKENS[::-1]]
        for graphs, size in tqdm(sizes, desc="Capturing", unit="graph", disable=None if progress else True):
            graphs[size] = self._capture_decode(size) if graphs is self._decodes else self._capture_prefill(size)
        self.capture_seconds = time.perf_counter() - start

    @torch.inference_mode()
    def _draw_in_float32(self, size: int) -> None:
        """Compiles the draw of rows whose logits were adjusted, which no graph holds, before a request waits for it."""
        logits = torch.zeros(size, self.rows.vocab_size, device=self.device)
        self.sampler.draw(logits, self.rows.columns(size))

    def recapture(self, count: int) -> None:
        """Captures the decode of `count` sequences again, where kernels would be launched otherwise than before."""
        size = self._size(count)
        self._decodes[size] = self._capture_decode(size)

    def _capture_decode(self, size: int) -> CapturedCall:
        columns = self.rows.columns(size)
        return self._capture(f"a decode of {size} sequences", lambda: self._decode_step(size, columns))

    def _capture_prefill(self, size: int) -> CapturedCall:
        token_ids, where = self._chunks.tensors(size, self.model.max_length)
        return self._capture(
            f"a prefill of {size} tokens", lambda: (self.model(token_ids, self.cache, where, last_only=True),)
        )

    @torch.inference_mode()
    def _capture(self, what: str, call: Callable[[], Any]) -> CapturedCall:
        try:
            captured = CapturedCall(call, self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"{what} cannot be captured in a CUDA graph with these kernels ({self.model.kernels}): {error}; choose "
                "others, or enforce_eager=True"
            ) from error
        self._pool = captured.pool
        return captured

    def _size(self, count: int) -> int:
        return self._buckets[bisect_left(self._buckets, count)]

    def _compute_rows(self, seqs: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        graph = self._decodes[self._size(len(seqs))]
        graph.replay()
        return graph.outputs

    def _compute_chunks(self, chunks: list[Chunk], all_tokens: bool) -> torch.Tensor:
        tokens = sum(chunk.length for chunk in chunks)
        if all_tokens or tokens > PREFILL_TOKENS[-1] or len(chunks) > PREFILL_CHUNKS:
            return super()._compute_chunks(chunks, all_tokens)
        size = PREFILL_TOKENS[bisect_left(PREFILL_TOKENS, tokens)]
        self._chunks.hold(chunks, size)
        graph = self._prefills[size]
        graph.replay()
        (hidden,) = graph.outputs
        return hidden[: len(chunks)]
