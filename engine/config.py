"""What an engine can be told, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .policy import Policy, make_policy

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """ValueError names the field, the value and what is allowed.

    max_batch_size:          requests that run at once
    max_model_len:           tokens of the longest text, prompt and output; None takes the model's
    max_prefill_tokens:      prompt tokens computed in one step; longer prompts are prefilled in chunks
    interleaved_prefill_tokens:  the same beside streams, while no more requests wait for their first token than
                             decode: what a long prompt adds to the time between the others' tokens
    device:                  "cuda", "cuda:N", "cpu" or "auto": a GPU if there is one
    dtype:                   "float32", "float16", "bfloat16" or "auto": the checkpoint's on a GPU, float32 on a CPU
    block_size:              tokens a cache block, 16 to 256
    num_blocks:              blocks of the cache; None sizes it from the free memory
    gpu_memory_utilization:  share of the GPU's memory for weights, cache and activations together
    enable_prefix_caching:   whether equal beginnings of prompts are computed once
    policy, alignment_window:  see `make_policy`
    age_bound:               seconds after which nothing that arrived later goes before a request
    async_scheduling:        whether a step is launched before the tokens of the last one are read; None: on a GPU
    enforce_eager:           whether decodes are launched kernel by kernel on a GPU too, instead of as CUDA graphs
    load_format:             "auto" reads the weights, "dummy" draws small random ones for the shape in config.json
    seed:                    of the requests that bring none
    progress:                whether to show progress bars and the start-up line, on standard error
    """

    max_batch_size: int = 32
    max_model_len: int | None = None
    max_prefill_tokens: int = 8192
    interleaved_prefill_tokens: int = 2048
    device: str = "auto"
    dtype: str = "auto"
    block_size: int = 256
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    policy: str = "sjf_aligned"
    alignment_window: int | None = None
    age_bound: float = 30.0
    async_scheduling: bool | None = None
    enforce_eager: bool = False
    load_format: str = "auto"
    seed: int = 0
    progress: bool = True

    def __post_init__(self):
        self._integer("max_batch_size", 1)
        self._integer("max_prefill_tokens", 1)
        self._integer("interleaved_prefill_tokens", 1)
        self._integer("block_size", 16, 256)
        self._integer("seed", -math.inf)
        if self.max_model_len is not None:
            self._integer("max_model_len", 2)  # a token to read and one to write
        if self.num_blocks is not None:
            self._integer("num_blocks", 1)
        if not (_is_number(self.gpu_memory_utilization) and 0 < self.gpu_memory_utilization <= 1):
            raise ValueError(
                f"gpu_memory_utilization={self.gpu_memory_utilization!r} must be a number over 0 and at most 1"
            )
        if not (_is_number(self.age_bound) and self.age_bound >= 0):
            raise ValueError(f"age_bound={self.age_bound!r} must be a number of at least 0 seconds")
        self._one_of("enable_prefix_caching", (True, False))
        self._one_of("async_scheduling", (True, False, None))
        self._one_of("enforce_eager", (True, False))
        self._one_of("progress", (True, False))
        self._one_of("dtype", ("auto", *DTYPES))
        self._one_of("load_format", ("auto", "dummy"))
        if self.alignment_window is not None:
            self._integer("alignment_window", 0)
        self.make_policy()

    def make_policy(self) -> Policy:
        return make_policy(self.policy, self.alignment_window)

    def resolve_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except (RuntimeError, TypeError):
            device = None
        if device is None or device.type not in ("cuda", "cpu"):
            raise ValueError(f"device={self.device!r} must be 'auto', 'cpu', 'cuda' or 'cuda:N'")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device={self.device!r}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs here")
        return device

    def resolve_dtype(self, checkpoint_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        return torch.float32 if device.type == "cpu" else checkpoint_dtype

    def _integer(self, name: str, low: float, high: int | None = None) -> None:
        value = getattr(self, name)
        inside = (
            isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
        )
        if not inside:
            allowed = "an integer" + (
                f" from {low} to {high}" if high else f" of at least {low}" if low > -math.inf else ""
            )
            raise ValueError(f"{name}={value!r} must be {allowed}")

    def _one_of(self, name: str, allowed: tuple[str | bool | None, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(str, allowed))}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
