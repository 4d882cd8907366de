"""The memory of the paged KV cache: how many blocks there is room for, and the blocks."""

from __future__ import annotations

import os

import torch

from ..model.config import ModelConfig
from ..model.qwen2 import LayerCache, Qwen2
from ..model.sampler import Sampler
from ..model.sampling_params import SamplingParams
from .config import EngineConfig
from .model_graph import PREFILL_TOKENS
from .model_runner import ModelRunner
from .scheduler import Batch, Chunk
from .sequence import Sequence

CPU_MEMORY_SHARE = 0.5
"""Of the free memory, for the cache on a CPU, which other programs share; untouched pages of it cost nothing."""

LOADED_LATER = 768 << 20
"""Bytes of a GPU for what is not there yet when the cache is sized: compiled kernels, workspaces, graphs. With 512 MiB
an engine of Qwen2-7B took 42 MB more than its share of an H200."""


def allocate_cache(
    config: ModelConfig, num_layers: int, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    """Keys and values of each layer, [blocks, block_size, kv_heads, head_dim].

    They are not initialised: only what was written is ever read.
    """
    shape = (num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim)
    return [(k, v) for k, v in torch.empty(shape, dtype=dtype, device=device)]


def num_blocks_that_fit(model: Qwen2, sampler: Sampler, config: EngineConfig, dtype: torch.dtype) -> int:
    """Blocks for `max_batch_size` texts of the model's `max_length`, or as many as there is memory for.

    On a GPU that is what `gpu_memory_utilization` leaves after the weights and the activations of the largest step,
    which is run once to see. ValueError where not one block fits.
    """
    device = model.embedding.device
    block_bytes = config.block_size * model.config.kv_bytes_per_token(dtype)
    wanted = config.max_batch_size * -(-model.max_length // config.block_size)
    if device.type == "cpu":
        room = int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * CPU_MEMORY_SHARE)
    else:
        activations = _activations_of_largest_step(model, sampler, config, dtype)
        free, total = torch.cuda.mem_get_info(device)
        room = int(total * config.gpu_memory_utilization) - (total - free) - activations - LOADED_LATER
    if room < block_bytes:
        raise ValueError(
            f"no room for the KV cache: a block of {config.block_size} tokens takes {block_bytes / 2**20:.1f} MiB, and "
            f"{max(room, 0) / 2**20:.1f} MiB are left; free some memory, raise gpu_memory_utilization "
            f"({config.gpu_memory_utilization}), or lower max_prefill_tokens or max_batch_size"
        )
    return min(wanted, room // block_bytes)


def _activations_of_largest_step(model: Qwen2, sampler: Sampler, config: EngineConfig, dtype: torch.dtype) -> int:
    """Peak bytes of the allocator in a prefill of max_prefill_tokens and in a decode of max_batch_size such texts.

    Graphs have a pool of their own, beside what a prefill needs that is too long for them.
    """
    device = model.embedding.device
    length = min(config.max_prefill_tokens, model.max_length)
    blocks = -(-length // config.block_size)
    layer = allocate_cache(model.config, 1, blocks, config.block_size, dtype, device)
    runner = ModelRunner(model, sampler, layer * model.config.num_layers, config.max_batch_size)
    seq = Sequence(0, [0] * length, SamplingParams(temperature=1.0, top_p=0.9), max_length=model.max_length)
    seq.block_table = list(range(blocks))

    def prefill(tokens: int) -> Batch:
        """Of so many tokens in all, or as many as a batch of texts has."""
        whole, rest = divmod(min(tokens, length * config.max_batch_size), length)
        chunks = [Chunk(seq, 0, length)] * whole + [Chunk(seq, 0, rest)] * (rest > 0)
        return Batch(chunks, [], [seq] * whole)

    before = torch.cuda.memory_reserved(device)
    everyone = [seq] * config.max_batch_size
    peaks = []
    for batch in (prefill(config.max_prefill_tokens), prefill(PREFILL_TOKENS[-1]), Batch([], everyone, everyone)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        runner.launch(batch).result()
        peaks.append(torch.cuda.max_memory_reserved(device) - before)
    del layer, runner
    torch.cuda.empty_cache()
    longest, captured, decode = peaks
    return max(longest, decode) if config.enforce_eager else longest + max(captured, decode)
