"""Small random models of each architecture, made by transformers, and what transformers computes with them."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from itertools import combinations, product
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 2048  # at 512 greedy texts run in circles
ORIGINAL_LENGTH = 32  # tokens; every test goes beyond it
MAX_LENGTH = 128

ARCHITECTURES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
ROPES = {
    "none": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL_LENGTH,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL_LENGTH},
}


@dataclass(frozen=True)
class Shape:
    """group: query heads a key-value head"""

    architecture: str = "qwen2"
    group: int = 7
    head_dim: int = 16
    tied: bool = False
    rope: str = "none"

    def __str__(self) -> str:
        return f"{self.architecture}-gqa{self.group}-d{self.head_dim}-{'tied' if self.tied else 'untied'}-{self.rope}"


def pairwise_shapes() -> list[Shape]:
    """Few shapes in which every two values of different fields meet, chosen greedily among all."""

    def pairs(shape: Shape) -> set:
        return set(combinations(zip([f.name for f in fields(Shape)], astuple(shape), strict=True), 2))

    every = [Shape(*values) for values in product(ARCHITECTURES, (1, 4, 7), (16, 64, 128), (True, False), ROPES)]
    missing = set().union(*map(pairs, every))
    chosen = []
    while missing:
        chosen.append(max(every, key=lambda shape: len(pairs(shape) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def make_model(shape: Shape, folder: Path) -> torch.nn.Module:
    """A random model in float32, saved to `folder` as a checkpoint.

    Weights have a standard deviation of 0.2: at transformers' 0.02 a tied model repeats its last token for ever, and
    then a broken model passes every comparison of tokens.
    """
    config_class, model_class = ARCHITECTURES[shape.architecture]
    config = config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=112,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2 * shape.group,
        num_key_value_heads=2,
        head_dim=shape.head_dim,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_theta": 10000.0, **ROPES[shape.rope]},
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def transformers_logits(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    """[tokens, vocab]"""
    return model(torch.tensor([token_ids], device=model.device)).logits[0]
