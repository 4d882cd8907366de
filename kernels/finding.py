"""What a look at a kernel gives: it prints as a table, shows as one in a notebook, draws itself and saves as JSON."""

from __future__ import annotations

import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from .origin import origin

GOOD, BAD = "#2a9d5c", "#d9534f"
"""Colours of a verdict, to be read on white and on black."""


@dataclass(frozen=True)
class Table:
    """Cells of text, as text and as HTML.

    title:  one line above it
    words:  how many columns at the left hold words; with `last_words` the last one does too. Others hold figures
    notes:  lines below it
    bad:    the rows to point at
    ok:     the verdict in the title, None where there is none
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 2
    last_words: bool = False
    notes: tuple[str, ...] = ()
    bad: frozenset[int] = frozenset()
    ok: bool | None = None

    def _is_words(self, column: int) -> bool:
        return column < self.words or (self.last_words and column == len(self.head) - 1)

    def __str__(self) -> str:
        return "\n".join([self.title, *self.lines(), *self.notes])

    def lines(self) -> list[str]:
        """The head and the rows, the columns aligned."""
        lines = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return [
            "  ".join(
                ["", *(f"{cell:{'<' if self._is_words(i) else '>'}{widths[i]}}" for i, cell in enumerate(line))]
            ).rstrip()
            for line in lines
        ]

    def html(self) -> str:
        """A fragment with all text escaped; it takes the page's own colours, but for the verdict's."""
        line = "border-bottom:1px solid rgba(128,128,128,.35)"

        def row(tag: str, cells: Sequence[str], style: str = "") -> str:
            aligned = (
                f'<{tag} style="text-align:{"left" if self._is_words(i) else "right"};padding:2px 10px 2px 0;{line}">'
                f"{escape(cell)}</{tag}>"
                for i, cell in enumerate(cells)
            )
            return f'<tr style="background:none;{style}">{"".join(aligned)}</tr>'

        colour = "" if self.ok is None else f";color:{GOOD if self.ok else BAD}"
        body = (row("td", cells, f"color:{BAD}" if i in self.bad else "") for i, cells in enumerate(self.rows))
        notes = (
            f'<pre style="margin:6px 0;white-space:pre-wrap">{escape(chr(10).join(self.notes).strip(chr(10)))}</pre>'
        )
        return (
            f'<div style="font-size:90%"><div style="font-weight:600{colour}">{escape(self.title)}</div>'
            f'<div style="overflow-x:auto"><table style="border-collapse:collapse">{row("th", self.head)}'
            f"{''.join(body)}</table></div>{notes if self.notes else ''}</div>"
        )


class Finding(ABC):
    """A result of the lab; Python shows its table, and so does a notebook."""

    kind: str
    """What the JSON is called: "check", "measurement", "comparison"."""

    device: str
    """The name of what it was made on, which need not be the GPU that there is."""

    @abstractmethod
    def table(self) -> Table: ...

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """All that was found, and on which device, in what JSON knows."""

    @abstractmethod
    def plot(self) -> Any:
        """A matplotlib Figure, which a notebook shows. ModuleNotFoundError without matplotlib."""

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().html()

    def save(self, path: str | Path) -> Path:
        """Writes it as JSON, with the date, the device, the versions, the commit and the command → the path."""
        path = Path(path)
        content = {**origin(), "kind": self.kind, **self.record()}
        path.write_text(json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")
        return path


def finite(value: Any) -> Any:
    """The value with None for the numbers that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure, in inches, that a notebook shows with or without pyplot."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"a plot needs matplotlib: pip install micro-vllm[bench] ({error})") from error

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=100)
            return file.getvalue()

    return Picture(figsize=(width, height), layout="constrained")
