"""The picture beside a record, drawn by whoever knows how."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from microvllm.kernels.measurement_picture import figure_of


def draw_beside(path: Path, draw: Callable[[dict[str, Any], Path], Path]) -> None:
    """The picture beside a record; only words where matplotlib is not installed."""
    try:
        print(draw(json.loads(path.read_text()), path.with_suffix(".png")), flush=True)
    except ModuleNotFoundError as error:
        print(f"no picture: {error} (pip install micro-vllm[bench])", flush=True)


def draw(record: dict[str, Any], path: Path) -> Path:
    """Draws a record of `bench.kernels` and returns the path. ModuleNotFoundError without matplotlib."""
    figure_of(record).savefig(path, dpi=130)
    return path
