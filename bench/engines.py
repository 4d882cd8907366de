"""Our engine and its peers behind one call: the seconds that a batch of prompts takes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from microvllm import InferenceEngine
from microvllm.engine.config import DTYPES, EngineConfig
from microvllm.model.checkpoint import open_checkpoint, resolve
from microvllm.model.config import ModelConfig

OURS = "micro-vllm"
MAX_BATCH_SIZE = 256
SHARE = 0.46
"""Of the GPU's memory for each of two engines on it."""
VLLM_ENVIRONMENT = {
    # Where the GPU has been looked for in this process, a fork of it cannot use CUDA.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # FlashInfer's sampler needs a compiler of CUDA at run time.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Unless the user has set these."""


@dataclass(frozen=True)
class Model:
    """What every engine loads.

    place:          a folder, a .gguf file, a known name or a hub name
    dtype:          a name that both engines know, never "auto": they would choose differently
    max_model_len:  tokens of the longest text; None takes the model's
    """

    place: str
    load_format: str
    dtype: str
    max_model_len: int | None = None

    @property
    def name(self) -> str:
        return Path(self.place).name

    @classmethod
    def open(
        cls, place: str, load_format: str, dtype: str, max_model_len: int | None = None
    ) -> tuple[Model, ModelConfig]:
        """The model, with the dtype that our engine would take for "auto", and its architecture."""
        config, engine = open_checkpoint(place, load_format).config, EngineConfig(dtype=dtype)
        resolved = engine.resolve_dtype(config.dtype, engine.resolve_device())
        name = next(name for name, known in DTYPES.items() if known == resolved)
        return cls(place, load_format, name, max_model_len), config


class Engine(Protocol):
    def seconds(self, prompts: list[list[int]], tokens: int, sampling: Mapping[str, float]) -> float:
        """The time to add exactly `tokens` tokens to each prompt."""


def our_engine(model: Model, **options: Any) -> InferenceEngine:
    """Our engine, with options of EngineConfig beside the model's own."""
    given = {"dtype": model.dtype, "load_format": model.load_format, "max_model_len": model.max_model_len}
    # Every turn must compute its prompts: a cached prefix would be a win of another kind.
    given |= {"max_batch_size": MAX_BATCH_SIZE, "enable_prefix_caching": False}
    return InferenceEngine(model.place, **given | options)


class Ours:
    def __init__(self, model: Model, **options: Any):
        self.engine = our_engine(model, **options)

    @property
    def capture_seconds(self) -> float:
        return self.engine.runner.capture_seconds

    def seconds(self, prompts: list[list[int]], tokens: int, sampling: Mapping[str, float]) -> float:
        start = time.perf_counter()
        outputs = self.engine.generate(prompts, max_tokens=tokens, ignore_eos=True, **sampling)
        taken = time.perf_counter() - start
        _expect(OURS, [len(output.token_ids) for output in outputs], tokens)
        return taken


class VLLM:
    """vLLM's offline engine; CUDA graphs, async scheduling and its token budget are its defaults."""

    def __init__(self, model: Model, share: float = SHARE):
        for name, value in VLLM_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import vllm

        self._params = vllm.SamplingParams
        self.engine = vllm.LLM(
            model=str(resolve(model.place, model.load_format)),
            load_format=model.load_format,
            dtype=model.dtype,
            max_model_len=model.max_model_len,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            gpu_memory_utilization=share,
        )

    def seconds(self, prompts: list[list[int]], tokens: int, sampling: Mapping[str, float]) -> float:
        sampling = dict(sampling) or {"temperature": 0.0}
        params = self._params(max_tokens=tokens, ignore_eos=True, detokenize=False, **sampling)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        outputs = self.engine.generate(inputs, params, use_tqdm=False)
        taken = time.perf_counter() - start
        _expect("vllm", [len(output.outputs[0].token_ids) for output in outputs], tokens)
        return taken


class Transformers:
    def __init__(self, model: Model):
        from transformers import AutoModelForCausalLM

        path = resolve(model.place)
        place = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        folder = path.parent if place else path
        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[model.dtype], **place)
        self.model = loaded.to(device).eval()

    def seconds(self, prompts: list[list[int]], tokens: int, sampling: Mapping[str, float]) -> float:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        start = time.perf_counter()
        with torch.inference_mode():
            texts = self.model.generate(ids, attention_mask=mask, do_sample=bool(sampling), **lengths, **sampling)
        taken = time.perf_counter() - start
        _expect("transformers", [texts.shape[1] - longest] * len(texts), tokens)
        return taken


PEERS = {"vllm": VLLM, "transformers": Transformers}


def share_beside(share: float = SHARE) -> float:
    """What to tell our engine beside others that are loaded: its share counts whatever else is on the GPU."""
    free, total = torch.cuda.mem_get_info()
    return min(0.95, 1 - free / total + share)


def _expect(name: str, lengths: list[int], tokens: int) -> None:
    if any(length != tokens for length in lengths):
        raise RuntimeError(f"{name} was asked for {tokens} tokens a request and gave {min(lengths)} to {max(lengths)}")
