"""The engines that these tests build."""

from __future__ import annotations

from pathlib import Path

from microvllm import InferenceEngine

BLOCK_SIZE = 16
OPTIONS = {"num_blocks": 64, "block_size": BLOCK_SIZE, "device": "cpu", "progress": False}


def make_engine(folder: Path, **options) -> InferenceEngine:
    return InferenceEngine(folder, **OPTIONS | options)
