"""A measurement as a file: rows, and all that is needed to take it again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from microvllm.kernels.origin import origin

RESULTS = Path(__file__).parent / "results"


def save(name: str, rows: list[dict[str, Any]], **about: Any) -> Path:
    """Writes bench/results/<gpu or cpu>/<name>.json: the rows, what they are about, and how to take them again."""
    folder = RESULTS / (
        re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()) if torch.cuda.is_available() else "cpu"
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    record = {**about, **origin(), "rows": rows}
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; numbers to three significant digits."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)] + [[_cell(row[column]) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
