"""The memory floor of a decode step: its weights and its keys and values, read once at the GPU's best."""

from __future__ import annotations

import torch
from microvllm.model.config import ModelConfig
from microvllm.model.loader import num_parameters

from .workloads import Workload


def step_bytes(config: ModelConfig, dtype: torch.dtype, workload: Workload) -> float:
    """Bytes that a step of the whole batch reads, in the mean over the workload's steps.

    Of an embedding that is not the head as well, a step reads a row for each request, which is nothing here.
    """
    unread = 0 if config.tied_head else config.vocab_size * config.hidden_size
    weights = (num_parameters(config) - unread) * dtype.itemsize
    # The step that draws token t + 1 attends to the prompt and t tokens, t from 1 to tokens − 1.
    prompt_tokens = sum(map(len, workload.prompts(config.vocab_size)))
    context = prompt_tokens + workload.requests * workload.tokens / 2
    return weights + context * config.kv_bytes_per_token(dtype)


def step_floor(config: ModelConfig, dtype: torch.dtype, workload: Workload, read: float) -> float:
    """Seconds.   read: bytes/s, as measured on this GPU in this run (`microvllm.kernels.roof`)"""
    return step_bytes(config, dtype, workload) / read
