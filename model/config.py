"""What a checkpoint's architecture is, as data: one decoder serves Qwen2, Qwen3 and Llama."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .rope import RopeConfig

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder with rotary grouped-query attention and SwiGLU; lengths in tokens.

    qkv_bias: the q, k and v projections have biases (Qwen2).   qk_norm: RMSNorm on each head of q and k (Qwen3).
    tied_head: the output head is the embedding.   max_length: the longest text the position embedding was made for.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_length: int
    rope: RopeConfig
    tied_head: bool
    dtype: torch.dtype
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "max_length"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, and it is {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads evenly"
            )
        object.__setattr__(self, "rms_norm_eps", _number("rms_norm_eps", self.rms_norm_eps))
        if self.head_dim % 2:
            raise ValueError(f"rotary embedding pairs the elements of a head, and head_dim is {self.head_dim}: odd")

    @property
    def qkv_bias(self) -> bool:
        return self.architecture == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.architecture == "qwen3"

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values that one token holds over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """From the contents of a Hugging Face `config.json`; ValueError names what is missing or not supported."""
        names = config.get("architectures") or ["(none)"]
        architecture = next((ours for name, ours in ARCHITECTURES.items() if names == [name]), None)
        if architecture is None:
            named = ", ".join(map(str, names)) if isinstance(names, list) else repr(names)
            raise ValueError(f"architecture {named} is not supported; supported are {', '.join(ARCHITECTURES)}")
        _refuse_unsupported(config, architecture)
        try:
            heads = config["num_attention_heads"]
            hidden_size = config["hidden_size"]
            max_position, tied_head = config["max_position_embeddings"], config.get("tie_word_embeddings") or False
            if not isinstance(max_position, int) or max_position < 1:
                raise ValueError(f"max_position_embeddings must be a positive integer, and it is {max_position!r}")
            if not isinstance(tied_head, bool):
                raise ValueError(f"tie_word_embeddings must be true or false, and it is {tied_head!r}")
            rope, max_length = _rope_from_hf(config, max_position)
            return cls(
                architecture=architecture,
                vocab_size=config["vocab_size"],
                hidden_size=hidden_size,
                intermediate_size=config["intermediate_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or default_head_dim(hidden_size, heads),
                rms_norm_eps=config["rms_norm_eps"],
                max_length=max_length,
                rope=rope,
                tied_head=tied_head,
                dtype=_dtype(config.get("dtype") or config.get("torch_dtype") or "float32"),
                eos_token_ids=token_ids(config.get("eos_token_id")),
            )
        except KeyError as missing:
            raise ValueError(f"config.json has no {missing}") from None


def _number(name: str, value: Any, least: float = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least {least:g}, and it is {value!r}")
    return float(value)


def default_head_dim(hidden_size: int, num_heads: int) -> int:
    """The elements of a head where a checkpoint does not say."""
    if not isinstance(hidden_size, int) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"a hidden size of {hidden_size!r} has no {num_heads!r} attention heads")
    return hidden_size // num_heads


def token_ids(value: int | list[int] | None) -> frozenset[int]:
    """The token ids in a config's `eos_token_id`, which is absent, a number or a list; ValueError for anything else."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ValueError(f"eos_token_id must be a token id or several, and it is {value!r}")
    return frozenset(ids)


def _refuse_unsupported(config: Mapping[str, Any], architecture: str) -> None:
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported; supported is 'silu'")
    windowed = config.get("use_sliding_window", architecture == "llama") and config.get("sliding_window")
    if windowed or "sliding_attention" in (config.get("layer_types") or ()):
        raise ValueError(f"sliding-window attention (sliding_window={config.get('sliding_window')}) is not supported")
    if architecture != "qwen2" and config.get("attention_bias"):
        raise ValueError(f"attention_bias is not supported in {architecture}")
    if config.get("mlp_bias"):
        raise ValueError("mlp_bias is not supported")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(f"a {method}-quantized checkpoint is not supported; use a plain one or a .gguf file")


def _rope_from_hf(config: Mapping[str, Any], max_position: int) -> tuple[RopeConfig, int]:
    """The rotary embedding and the longest text it serves.

    transformers 5 writes `rope_parameters`; before it, `rope_theta` and `rope_scaling`.
    """
    scaled, parameters = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    for key, value in (("rope_scaling", scaled), ("rope_parameters", parameters)):
        if not isinstance(value, Mapping):
            raise ValueError(f"{key} must be an object, and it is {value!r}")
    # Who adds rope_scaling to a config that has rope_parameters means it to count, and transformers has it so.
    rope = scaled or parameters
    bases = [place.get("rope_theta") for place in (rope, config, parameters)]
    theta = _number("rope_theta", next(filter(None, bases), 10000.0))
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ValueError("a rotary embedding of part of a head (partial_rotary_factor) is not supported")
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if scaling == "default":
        return RopeConfig(theta), max_position
    if scaling not in ("linear", "llama3", "yarn"):
        raise ValueError(f"RoPE scaling {scaling!r} is not supported; supported are none, linear, llama3 and yarn")
    factor = _number("RoPE scaling's factor", rope["factor"], least=1)
    if scaling == "linear":
        return RopeConfig(theta, "linear", factor), max_position
    original = int(
        _number("RoPE's original length", rope.get("original_max_position_embeddings") or max_position, least=1)
    )
    if scaling == "llama3":
        low, high = (_number(f"RoPE's {name}", rope[name]) for name in ("low_freq_factor", "high_freq_factor"))
        if low >= high:
            raise ValueError(f"RoPE's low_freq_factor {low} must be under its high_freq_factor {high}")
        return RopeConfig(theta, "llama3", factor, original, low, high), max_position
    yarn = RopeConfig(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=_number("RoPE's beta_fast", rope.get("beta_fast") or 32),
        beta_slow=_number("RoPE's beta_slow", rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=_yarn_attention_factor(rope, factor),
    )
    # Qwen's configs keep the length before the stretch in max_position_embeddings, others the one after it.
    return yarn, max(max_position, int(original * factor))


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """The paper's 0.1 · ln(factor) + 1 (arXiv:2309.00071, eq. 22), unless the checkpoint names its own."""
    if rope.get("attention_factor") is not None:
        return _number("RoPE's attention_factor", rope["attention_factor"])

    def mscale(weight: Any) -> float:
        return 0.1 * _number("RoPE's mscale", weight) * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)


def _dtype(name: Any) -> torch.dtype:
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if not isinstance(name, str) or name not in dtypes:
        raise ValueError(f"dtype {name!r} is not supported; supported are {', '.join(dtypes)}")
    return dtypes[name]
