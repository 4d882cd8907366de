"""The decoder of Qwen2, and of Qwen3 and Llama, which differ from it in a bias and a norm (see ModelConfig)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.kernel_set import KernelSet
from .attention_metadata import AttentionMetadata
from .config import ModelConfig

LayerCache = tuple[torch.Tensor, torch.Tensor]
"""A layer's keys and values: two of [blocks, block_size, kv_heads, head_dim]."""


def read_by(config: ModelConfig) -> dict[str, str]:
    """The operator that reads each projection's weight."""
    return {
        "qkv_weight": "norm_linear" if config.qk_norm else "norm_qkv_rotary_store_kv",
        "o_weight": "linear_add_norm",
        "gate_up_weight": "norm_gate_up_swiglu",
        "down_weight": "linear_add_norm",
        "head": "linear",
    }


def other_layouts(config: ModelConfig, a: KernelSet, b: KernelSet) -> list[str]:
    """The operators whose weights two sets of kernels read in different layouts: a model cannot hold those for both."""
    return [op for op in dict.fromkeys(read_by(config).values()) if a.preparation(op) != b.preparation(op)]


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class Attention(nn.Module):
    """From the residual stream, or its norm, to what the o product reads."""

    def __init__(self, config: ModelConfig, kernels: KernelSet):
        super().__init__()
        self.config, self.kernels = config, kernels
        self.reader = read_by(config)["qkv_weight"]
        self.norm = _weight(config.hidden_size)
        width = config.head_dim * (config.num_heads + 2 * config.num_kv_heads)
        self.qkv_weight = _weight(width, config.hidden_size)
        self.qkv_bias = _weight(width) if config.qkv_bias else None
        self.q_norm = _weight(config.head_dim) if config.qk_norm else None
        self.k_norm = _weight(config.head_dim) if config.qk_norm else None
        self.o_weight = _weight(config.hidden_size, config.head_dim * config.num_heads)
        self.scale = config.head_dim**-0.5

    def norm_ahead(self, tokens: int) -> torch.Tensor | None:
        """The weight of its norm, which is then computed before; None where the qkv product's kernel computes it."""
        return self.norm if self.kernels.runs("rms_norm", self.reader, tokens) else None

    def forward(
        self,
        x: torch.Tensor,
        normed: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: LayerCache,
        where: AttentionMetadata,
        last: torch.Tensor | None,
    ) -> torch.Tensor:
        """x and its norm [tokens, hidden], or None as `norm_ahead` says → [tokens, heads·head_dim], or a row for each
        chunk's token in `last`
        """
        config, kernels = self.config, self.kernels
        heads, kv_heads = config.num_heads, config.num_kv_heads
        k_cache, v_cache = cache
        product = (x, self.norm, config.rms_norm_eps, self.qkv_weight, self.qkv_bias)
        place = (cos, sin, where.positions, k_cache, v_cache, where.slot_mapping)
        if normed is None and not config.qk_norm:
            q = kernels.norm_qkv_rotary_store_kv(*product, *place, heads)
        else:
            if normed is None:
                qkv = kernels.norm_linear(*product)
            else:
                qkv = kernels.linear(normed, self.qkv_weight, self.qkv_bias)
            qkv = qkv.view(-1, heads + 2 * kv_heads, config.head_dim)
            q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
            if config.qk_norm:
                q = kernels.rms_norm(q, self.q_norm, config.rms_norm_eps)
                k = kernels.rms_norm(k, self.k_norm, config.rms_norm_eps)
            if where.is_decode:
                out = kernels.append_attention(q, k, v, *place, where.block_table, where.context_lens, self.scale)
                return out.flatten(1)
            q = kernels.rotary_store_kv(q, k, v, *place)
        if last is not None:
            q = q[last]  # each attends to all of its context, as in a decode
        if where.is_decode or last is not None:
            out = kernels.paged_attention(q, k_cache, v_cache, where.block_table, where.context_lens, self.scale)
        else:
            out = kernels.prefill_attention(
                q,
                k_cache,
                v_cache,
                where.block_table,
                where.query_start,
                where.context_lens,
                where.max_query_len,
                where.max_context_len,
                self.scale,
            )
        return out.flatten(1)


class MLP(nn.Module):
    """From the residual stream, or its norm, to what the down product reads."""

    def __init__(self, config: ModelConfig, kernels: KernelSet):
        super().__init__()
        self.eps, self.kernels = config.rms_norm_eps, kernels
        self.norm = _weight(config.hidden_size)
        self.gate_up_weight = _weight(2 * config.intermediate_size, config.hidden_size)
        self.down_weight = _weight(config.hidden_size, config.intermediate_size)

    def norm_ahead(self, tokens: int) -> torch.Tensor | None:
        """As Attention's, for the gate and up product."""
        return self.norm if self.kernels.runs("rms_norm", "norm_gate_up_swiglu", tokens) else None

    def forward(self, x: torch.Tensor, normed: torch.Tensor | None) -> torch.Tensor:
        """x and its norm [tokens, hidden], or None as `norm_ahead` says → [tokens, intermediate]"""
        if normed is None:
            return self.kernels.norm_gate_up_swiglu(x, self.norm, self.eps, self.gate_up_weight)
        return self.kernels.linear_swiglu(normed, self.gate_up_weight)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, kernels: KernelSet):
        super().__init__()
        self.eps, self.kernels = config.rms_norm_eps, kernels
        self.attention = Attention(config, kernels)
        self.mlp = MLP(config, kernels)

    def forward(
        self,
        x: torch.Tensor,
        normed: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: LayerCache,
        where: AttentionMetadata,
        next_norm: torch.Tensor | None,
        last: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [tokens, hidden], the residual stream, with what this layer adds to it, and its norm by next_norm.

        A norm is computed with the sum that it is of, or, where it is None, by the kernel that reads it. With `last`,
        where each chunk's last token stands, a prefill's keys and values are those of all tokens, and what it returns
        is of these alone.
        """
        add, attention, mlp = self.kernels.linear_add_norm, self.attention, self.mlp
        y = attention(x, normed, cos, sin, cache, where, last)
        if last is not None:
            x = x[last]
        x, normed = add(y, attention.o_weight, x, mlp.norm_ahead(len(x)), self.eps)
        return add(mlp(x, normed), mlp.down_weight, x, next_norm, self.eps)


class Qwen2(nn.Module):
    """Token ids to hidden states to logits. Weights are uninitialised until the loader fills them.

    max_length: positions the rotary table holds.
    """

    def __init__(self, config: ModelConfig, kernels: KernelSet, max_length: int):
        super().__init__()
        self.config, self.kernels = config, kernels
        self.embedding = _weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, kernels) for _ in range(config.num_layers))
        self.norm = _weight(config.hidden_size)
        self.head = self.embedding if config.tied_head else _weight(config.vocab_size, config.hidden_size)
        self.max_length = max_length

    def prepare(self) -> None:
        """To be called once when the weights are there: makes the rotary table beside them, and puts each projection's
        weight into the layout that the kernel wants which reads it. A tied head that needs another than the
        embedding's takes memory of its own.
        """
        self.cos, self.sin = self.config.rope.table(self.config.head_dim, self.max_length, self.embedding.device)
        for module in self.modules():
            for name, op in read_by(self.config).items():
                if name in module._parameters:
                    prepared = self.kernels.prepare(op, getattr(module, name))
                    delattr(module, name)
                    setattr(module, name, prepared)

    def with_kernels(self, kernels: KernelSet) -> Qwen2:
        """The model with other kernels on the same weights; ValueError where one reads a weight in another layout."""
        for op in other_layouts(self.config, self.kernels, kernels):
            raise ValueError(f"these kernels read the weight of {op} in another layout, and need weights of their own")
        kept = [x for module in self.modules() for x in (*module._parameters.values(), *vars(module).values())]
        kept = {id(x): x for x in kept if isinstance(x, torch.Tensor)}
        return copy.deepcopy(self, {**kept, id(self.config): self.config, id(self.kernels): kernels})

    def forward(
        self,
        token_ids: torch.Tensor,
        cache: list[LayerCache],
        where: AttentionMetadata,
        *,
        last_only: bool = False,
    ) -> torch.Tensor:
        """The final hidden state of each token; its keys and values go into the cache on the way.

        token_ids [tokens] int64, one cache a layer → [tokens, hidden]. last_only: of a prefill, the states of each
        chunk's last token alone, [sequences, hidden]; the last layer then computes nothing for the others but their
        keys and values, for nothing reads it.
        """
        x = F.embedding(token_ids, self.embedding)
        first, *others = (layer.attention.norm_ahead(len(x)) for layer in self.layers)
        normed = None if first is None else self.kernels.rms_norm(x, first, self.config.rms_norm_eps)
        for layer, layer_cache, next_norm in zip(self.layers, cache, (*others, self.norm), strict=True):
            last = where.last_tokens if last_only and layer is self.layers[-1] else None
            x, normed = layer(x, normed, self.cos, self.sin, layer_cache, where, next_norm, last)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [rows, hidden] → [rows, vocab]"""
        return self.kernels.linear(hidden, self.head)
