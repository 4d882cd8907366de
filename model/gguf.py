"""GGUF, llama.cpp's one-file checkpoint: metadata, tokenizer and tensors, most of them quantized in blocks."""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from .config import ModelConfig, default_head_dim
from .gguf_tokenizer import eos_token_ids
from .rope import RopeConfig
from .tokenizer import Tokenizer

FLOAT_TYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
TENSOR_TYPES = frozenset(
    {
        *FLOAT_TYPES,
        GGMLQuantizationType.Q4_0,
        GGMLQuantizationType.Q4_1,
        GGMLQuantizationType.Q5_0,
        GGMLQuantizationType.Q8_0,
        GGMLQuantizationType.Q4_K,
        GGMLQuantizationType.Q5_K,
        GGMLQuantizationType.Q6_K,
    }
)

# gguf's dequantize holds several float32 copies of what it is given: 4 MB of result costs some 20 MB.
PIECE_ELEMENTS = 1 << 20

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_KEYS = frozenset(
    {
        "vocab_size",
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
        "rope.scaling.original_context_length",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    }
)

# Features that this decoder lacks, each with the value that says that the model does without.
_ABSENT = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.sliding_window": 0,
    "attention.causal": True,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
_INFORMATIVE = frozenset({"rope.scaling.finetuned", "tensor_data_layout"})

# struct's codes for the numbers of a GGUF header.
_NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file holds it: row-major `shape`, and the place of its first byte in the file."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * block_bytes

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


class GGUFFile:
    """A `.gguf` file as a Checkpoint (see checkpoint.py); ValueError for what it is not or does not support."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self.metadata, stored = read_header(path)
        divisors = stored.pop("rope_freqs.weight", None)
        if divisors is not None:
            divisors = tuple(torch.cat(list(self._pieces(divisors, align=1))).tolist())
        self.config = config_from_gguf(self.metadata, stored, divisors)
        self._stored = {_hugging_face_name(name): tensor for name, tensor in stored.items()}
        self.shapes = {name: tensor.shape for name, tensor in self._stored.items()}

    def read(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in float, in pieces of consecutive rows that are small beside a model."""
        permuted = self.config.architecture == "llama" and re.search(r"\.[qk]_proj\.", name)
        head_dim = self.config.head_dim
        for piece in self._pieces(self._stored[name], align=head_dim if permuted else 1):
            if permuted:
                # llama.cpp rotates neighbours (2i, 2i + 1) where Hugging Face rotates (i, i + head_dim / 2), and its
                # converter reorders the rows of q and k, of this architecture alone, to suit.
                piece = piece.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
            yield piece

    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.from_gguf(self.metadata) if "tokenizer.ggml.model" in self.metadata else None

    def _pieces(self, tensor: StoredTensor, align: int) -> Iterator[torch.Tensor]:
        step = align * max(1, PIECE_ELEMENTS // (tensor.shape[-1] * align))
        for start in range(0, tensor.rows, step):
            rows = min(step, tensor.rows - start)
            offset = tensor.offset + start * tensor.row_bytes
            # Read, not mapped: the pages of a mapping count as this process's memory.
            raw = np.fromfile(self.path, np.uint8, rows * tensor.row_bytes, offset=offset)
            if tensor.type in FLOAT_TYPES:
                piece = torch.from_numpy(raw).view(FLOAT_TYPES[tensor.type])
            else:
                piece = torch.from_numpy(dequantize(raw.reshape(rows, -1), tensor.type))
            yield piece.reshape(-1, *tensor.shape[1:])


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The metadata and the tensors of a GGUF file by their names in it, without reading a weight.

    ValueError if the file is not GGUF of version 2 or 3, is truncated, or holds a tensor type that is not supported.
    gguf.GGUFReader reads the same and takes 2.5 s for 49152 tokens, 8.6 s for Qwen's 151936: it makes numpy arrays of
    each string. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    with path.open("rb") as file:
        header = _Header(path, file)
        if header.size < 4 or header.take(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file")
        version = header.number(GGUFValueType.UINT32)
        if version not in (2, 3):
            raise ValueError(f"{path} is GGUF of version {version}; supported are 2 and 3, little-endian")
        tensor_count, key_count = header.number(GGUFValueType.UINT64), header.number(GGUFValueType.UINT64)
        metadata = {}
        for _ in range(key_count):
            key = header.string()
            metadata[key] = header.value(header.value_type())
        tensors = dict(header.tensor() for _ in range(tensor_count))
        if len(tensors) != tensor_count:
            raise ValueError(f"{path} names a tensor twice")
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{path} is corrupt: its general.alignment is {alignment!r}")
        data_start = -(-file.tell() // alignment) * alignment
    placed = {}
    for name, tensor in tensors.items():
        placed[name] = StoredTensor(tensor.shape, tensor.type, data_start + tensor.offset)
        end = placed[name].offset + tensor.rows * tensor.row_bytes
        if end > header.size:
            raise ValueError(f"{path} is truncated: {name} ends at byte {end}, and the file has {header.size}")
    return metadata, placed


class _Header:
    """Reads the fields of a GGUF header in order, and nothing past the end of the file."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.size = path.stat().st_size

    def take(self, count: int) -> bytes:
        end = self.file.tell() + count
        if end > self.size:
            raise ValueError(f"{self.path} is truncated: its header reaches byte {end}, and the file has {self.size}")
        return self.file.read(count)

    def numbers(self, kind: GGUFValueType, count: int) -> list[int | float | bool]:
        code = _NUMBERS[kind]
        values = np.frombuffer(self.take(struct.calcsize(code) * count), f"<{code}").tolist()
        if kind is GGUFValueType.FLOAT32:
            # 1e-5 in float32 is 9.99999974e-06; the shortest decimal is what its author wrote.
            return [float(str(np.float32(value))) for value in values]
        return values

    def number(self, kind: GGUFValueType) -> int | float | bool:
        return self.numbers(kind, 1)[0]

    def string(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        text = self.take(length)
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path} is corrupt: {text[:40]!r} in its header is not UTF-8") from None

    def value_type(self) -> GGUFValueType:
        number = self.number(GGUFValueType.UINT32)
        if number not in frozenset(GGUFValueType):
            raise ValueError(f"{self.path} is corrupt: metadata of type {number} in its header")
        return GGUFValueType(number)

    def value(self, kind: GGUFValueType) -> Any:
        if kind is GGUFValueType.STRING:
            return self.string()
        if kind is not GGUFValueType.ARRAY:
            return self.number(kind)
        element, count = self.value_type(), self.number(GGUFValueType.UINT64)
        if element is GGUFValueType.ARRAY:
            raise ValueError(f"{self.path} has an array of arrays in its metadata, which is not supported")
        if element is GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        return self.numbers(element, count)

    def tensor(self) -> tuple[str, StoredTensor]:
        """A tensor's name, and itself with the offset from the start of the data."""
        name = self.string()
        dimensions = self.numbers(GGUFValueType.UINT64, self.number(GGUFValueType.UINT32))
        number, offset = self.number(GGUFValueType.UINT32), self.number(GGUFValueType.UINT64)
        kind = GGMLQuantizationType(number) if number in frozenset(GGMLQuantizationType) else None
        if kind not in TENSOR_TYPES:
            supported = ", ".join(kind.name for kind in sorted(TENSOR_TYPES))
            label = kind.name if kind is not None else f"number {number}"
            raise ValueError(f"{self.path}: {name} has the type {label}, not supported; supported are {supported}")
        shape = tuple(reversed(dimensions))  # GGUF lists the fastest dimension first
        if not shape or 0 in shape or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"{self.path} is corrupt: {name} of type {kind.name} has the shape {shape}")
        return name, StoredTensor(shape, kind, offset)


def config_from_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor], divisors: tuple[float, ...] | None
) -> ModelConfig:
    """The architecture that a GGUF file's metadata describes; ValueError names what is missing or not supported.

    tensors: by their names in the file.   divisors: the contents of its `rope_freqs.weight`, if it has one.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"GGUF architecture {architecture!r} is not supported; supported are llama, qwen2 and qwen3")
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"the GGUF file is one of {metadata['split.count']} parts: merge them with llama-gguf-split")
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    for key, value in values.items():
        if key not in _KEYS | _INFORMATIVE and _ABSENT.get(key) != value:
            raise ValueError(f"GGUF metadata {prefix}{key} = {str(value)[:40]} is not supported")
    if "token_embd.weight" not in tensors:
        raise ValueError("the GGUF file has no tensor token_embd.weight")
    try:
        heads, hidden_size = values["attention.head_count"], values["embedding_length"]
        head_dim = values.get("attention.key_length") or default_head_dim(hidden_size, heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if values.get(key, head_dim) != head_dim:
                raise ValueError(f"{prefix}{key} = {values[key]} must equal the head's {head_dim} elements")
        rope, max_length = _rope_from_gguf(values, divisors, head_dim)
        return ModelConfig(
            architecture=architecture,
            vocab_size=values.get("vocab_size", tensors["token_embd.weight"].shape[0]),
            hidden_size=hidden_size,
            intermediate_size=values["feed_forward_length"],
            num_layers=values["block_count"],
            num_heads=heads,
            num_kv_heads=values.get("attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=values["attention.layer_norm_rms_epsilon"],
            max_length=max_length,
            rope=rope,
            tied_head="output.weight" not in tensors,
            dtype=_dtype(tensors),
            eos_token_ids=eos_token_ids(metadata),
        )
    except KeyError as missing:
        raise ValueError(f"the GGUF metadata has no {prefix}{missing.args[0]}") from None


def _rope_from_gguf(
    values: Mapping[str, Any], divisors: tuple[float, ...] | None, head_dim: int
) -> tuple[RopeConfig, int]:
    """The rotary embedding and the longest text it serves; llama.cpp's defaults, where a bare factor means linear."""
    theta, length = values.get("rope.freq_base", 10000.0), values["context_length"]
    scaling = values.get("rope.scaling.type", "linear")
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear", 0.0)) or 1.0
    temperature = values.get("rope.scaling.attn_factor", 1.0)
    if scaling not in ("none", "linear", "yarn"):
        raise ValueError(f"RoPE scaling {scaling!r} is not supported in GGUF; supported are none, linear and yarn")
    if divisors is not None:
        if scaling == "yarn" or (scaling == "linear" and factor != 1):
            raise ValueError(f"rope_freqs.weight together with RoPE scaling {scaling!r} is not supported")
        if len(divisors) != head_dim // 2:
            raise ValueError(f"rope_freqs.weight has {len(divisors)} divisors, and a head has {head_dim // 2} pairs")
        return RopeConfig(theta, "llama3", divisors=divisors, attention_factor=temperature), length
    if scaling == "yarn":
        original = values.get("rope.scaling.original_context_length", length)
        yarn = RopeConfig(
            theta,
            "yarn",
            factor,
            original,
            beta_fast=values.get("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=values.get("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=temperature * (0.1 * math.log(factor) + 1.0),
        )
        return yarn, max(length, int(original * factor))
    if scaling == "linear" and factor != 1:
        return RopeConfig(theta, "linear", factor, attention_factor=temperature), length
    return RopeConfig(theta, attention_factor=temperature), length


def _dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype of most elements; bfloat16 for a quantized model, whose range float16 may not hold."""
    elements = Counter()
    for tensor in tensors.values():
        elements[tensor.type] += math.prod(tensor.shape)
    return FLOAT_TYPES.get(elements.most_common(1)[0][0], torch.bfloat16)


def _hugging_face_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        raise ValueError(f"the GGUF tensor {name} is not supported")
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{_NAMES[match[2]]}.{match[3]}"
