"""A checkpoint's weights into the model, each straight to its place on the device."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import nn
from tqdm import tqdm

from ..kernels.kernel_set import KernelSet
from .checkpoint import LOAD_FORMATS, Checkpoint
from .config import ModelConfig
from .qwen2 import Qwen2

Shapes = Mapping[str, tuple[int, ...]]


def load_model(
    checkpoint: Checkpoint,
    kernels: KernelSet,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    max_length: int,
    load_format: str = "auto",
    progress: bool = True,
) -> Qwen2:
    """The model with the checkpoint's weights on `device` in `dtype`, and a rotary table for `max_length` positions.

    The host holds one small piece of a tensor at a time beside the model itself. load_format "dummy" fills the model
    with small random weights, the same each time. progress: a bar on stderr where that is a terminal.
    ValueError, before anything is allocated, for tensors that are missing, extra or of a wrong shape.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format {load_format!r} does not exist; there are {', '.join(LOAD_FORMATS)}")
    sources = parameter_sources(checkpoint.config)
    if load_format == "auto":
        check_tensors(checkpoint.shapes, sources)
    with torch.device("meta"):
        model = Qwen2(checkpoint.config, kernels, max_length)
    _allocate(model, torch.device(device), dtype)
    if load_format == "auto":
        _read_weights(model, checkpoint, sources, progress)
    else:
        _draw_weights(model)
    model.prepare()
    return model.eval()


def parameter_sources(config: ModelConfig) -> dict[str, Shapes]:
    """For each parameter of Qwen2 the tensors that are stacked in it along dimension 0, in order, with their shapes.

    Projections that read the same input are one parameter, so that one matrix product computes them.
    """
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads = {"q": config.num_heads * head_dim, "k": config.num_kv_heads * head_dim, "v": config.num_kv_heads * head_dim}
    sources: dict[str, Shapes] = {"embedding": {"model.embed_tokens.weight": (config.vocab_size, hidden)}}
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        sources[f"{ours}.attention.norm"] = {f"{theirs}.input_layernorm.weight": (hidden,)}
        sources[f"{ours}.attention.qkv_weight"] = {
            f"{attention}.{part}_proj.weight": (rows, hidden) for part, rows in heads.items()
        }
        if config.qkv_bias:
            sources[f"{ours}.attention.qkv_bias"] = {
                f"{attention}.{part}_proj.bias": (rows,) for part, rows in heads.items()
            }
        if config.qk_norm:
            sources[f"{ours}.attention.q_norm"] = {f"{attention}.q_norm.weight": (head_dim,)}
            sources[f"{ours}.attention.k_norm"] = {f"{attention}.k_norm.weight": (head_dim,)}
        sources[f"{ours}.attention.o_weight"] = {f"{attention}.o_proj.weight": (hidden, heads["q"])}
        sources[f"{ours}.mlp.norm"] = {f"{theirs}.post_attention_layernorm.weight": (hidden,)}
        sources[f"{ours}.mlp.gate_up_weight"] = {
            f"{mlp}.{part}_proj.weight": (intermediate, hidden) for part in ("gate", "up")
        }
        sources[f"{ours}.mlp.down_weight"] = {f"{mlp}.down_proj.weight": (hidden, intermediate)}
    sources["norm"] = {"model.norm.weight": (hidden,)}
    if not config.tied_head:
        sources["head"] = {"lm_head.weight": (config.vocab_size, hidden)}
    return sources


def num_parameters(config: ModelConfig) -> int:
    return sum(prod(shape) for tensors in parameter_sources(config).values() for shape in tensors.values())


def check_tensors(shapes: Shapes, sources: Mapping[str, Shapes]) -> None:
    """ValueError names the tensors that are missing, those that have no place in the model, or a wrong shape."""
    expected = {name: shape for tensors in sources.values() for name, shape in tensors.items()}
    for names, problem in (
        (expected.keys() - shapes.keys(), "the checkpoint lacks"),
        (shapes.keys() - expected.keys(), "the model has no place for"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{problem} {', '.join(sorted(names)[:3])}{more}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{name} has the shape {list(shapes[name])}, and the config asks for {list(shape)}")


def _allocate(model: Qwen2, device: torch.device, dtype: torch.dtype) -> None:
    """In place of `model.to_empty`, which would give a tied head memory of its own."""
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        weight = torch.empty_like(parameter, device=device, dtype=dtype)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
    if model.config.tied_head:
        model.head = model.embedding


def _read_weights(model: Qwen2, checkpoint: Checkpoint, sources: Mapping[str, Shapes], progress: bool) -> None:
    parameters = dict(model.named_parameters())
    assert parameters.keys() == sources.keys()
    total = sum(parameter.nbytes for parameter in parameters.values())
    disable = None if progress else True  # None: tqdm shows a bar on terminals alone
    with tqdm(total=total, desc=f"Loading {checkpoint.name}", unit="B", unit_scale=True, disable=disable) as bar:
        for name, parameter in parameters.items():
            row = 0
            for source in sources[name]:
                for piece in checkpoint.read(source):
                    place = parameter[row : row + len(piece)]
                    place.copy_(piece)
                    row += len(piece)
                    bar.update(place.nbytes)
            assert row == len(parameter), name


def _draw_weights(model: Qwen2) -> None:
    """Scales that keep activations finite and logits apart: 0.02 is what Qwen2 and Llama are initialised with."""
    generator = torch.Generator(model.embedding.device).manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.normal_(mean=1.0 if name.endswith("norm") else 0.0, std=0.02, generator=generator)
