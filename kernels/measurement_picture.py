"""A picture of an operator's times: against context or size, log-log, beside its peers and the roof."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import fill
from typing import Any

from .finding import new_figure

X_AXES = ("context", "query", "tokens", "rows", "batch")
"""The first of these sizes that differs between cases is the horizontal axis."""
ACROSS = {"context": "batch"}
"""Beside that axis, the size whose values stand side by side."""
OURS = "#c1121f"
PEER_COLOURS = ("#4361ee", "#2a9d8f", "#8338ec", "#e09f3e", "#6c757d", "#00a6fb")
COLUMNS = 5  # at most, of panels that have no order of their own

Point = dict[str, Any]
Panel = tuple[str, list[Point], bool]  # title, points, whether they lie on a line


def arrange(points: Sequence[Point]) -> tuple[str, list[list[Panel]]]:
    """(the horizontal axis, rows of panels): one panel for each set of the other sizes.

    Where such sets have a point each, no line joins them, and they stand beside each other in one panel.
    """
    keys = list(dict.fromkeys(key for point in points for key in point["sizes"]))
    varied = [key for key in keys if len({point["sizes"].get(key) for point in points}) > 1]
    axis = next((key for key in X_AXES if key in varied), None) or next((key for key in X_AXES if key in keys), keys[0])
    across = ACROSS.get(axis)
    apart = [key for key in varied if key not in (axis, across, "shortest")]
    groups: dict[str, list[Point]] = {}
    for point in points:
        sizes = point["sizes"]
        groups.setdefault(_text({key: sizes[key] for key in apart if key in sizes}), []).append(point)

    lines: list[list[Panel]] = []
    loose: list[Panel] = []
    for title, group in groups.items():
        columns: dict[Any, list[Point]] = {}
        for point in group:
            columns.setdefault(point["sizes"].get(across), []).append(point)
        if max(len({_place(point, axis) for point in column}) for column in columns.values()) == 1:
            loose.append((title, group, False))
        elif across:
            lines.append([(f"{across} {value}\n{title}".strip(), column, True) for value, column in columns.items()])
        else:
            loose.append((title, group, True))
    width = -(-len(loose) // -(-len(loose) // COLUMNS)) if loose else 1  # lines as equally long as can be
    return axis, lines + [loose[i : i + width] for i in range(0, len(loose), width)]


def figure_of(record: dict[str, Any]) -> Any:
    """A matplotlib Figure of a measurement's record. ModuleNotFoundError without matplotlib."""
    axis, rows = arrange(record["points"])
    columns = max(map(len, rows))
    figure = new_figure(1.2 + 3.3 * columns, 1.3 + 2.9 * len(rows))
    panels = figure.subplots(len(rows), columns, squeeze=False)
    peers = list(dict.fromkeys(name for point in record["points"] for name in point["peers"]))
    colours = {name: PEER_COLOURS[i % len(PEER_COLOURS)] for i, name in enumerate(peers)}
    handles: dict[str, Any] = {}
    for row, axes_row in zip(rows, panels, strict=True):
        for axes in axes_row[len(row) :]:
            axes.set_visible(False)
        for panel, axes in zip(row, axes_row, strict=False):
            _draw_panel(axes, axis, panel, colours, record["kernel"], handles)
            launch = axes.axhline(record["roof"]["launch"] * 1e6, color="#888888", linewidth=1, linestyle=":")
            handles.setdefault("an empty kernel", launch)
        axes_row[0].set_ylabel("µs")
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(8, len(handles)), frameon=False
    )
    roof = record["roof"]
    figure.suptitle(
        f"{record['operator']} in {record['dtype']}\n{record['device']}: reads {roof['read'] / 1e12:.2f} TB/s, "
        f"copies {roof['copy'] / 1e12:.2f} TB/s, {roof['flops'] / 1e12:.0f} TFLOP/s; {record['date']}, "
        f"commit {record['commit']}",
        fontsize=9,
    )
    return figure


def _draw_panel(
    axes: Any, axis: str, panel: Panel, colours: dict[str, str], kernel: str, handles: dict[str, Any]
) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    title, points, joined = panel
    points = sorted(points, key=lambda point: _place(point, axis)) if joined else points
    places = [_place(point, axis) for point in points] if joined else list(range(len(points)))

    def line(times: list[Any], name: str, **style: Any) -> list[float]:
        """Points that have a time; those of mixed lengths stand alone."""
        shown = [(x, t, "shortest" in point["sizes"]) for x, t, point in zip(places, times, points, strict=True)]
        on = [(x, math.nan if t is None else t) for x, t, mixed in shown if not mixed]  # NaN breaks the line
        off = [(x, t) for x, t, mixed in shown if mixed and t is not None]
        if on:
            (handle,) = axes.plot(*zip(*on, strict=True), **(style if joined else style | {"linestyle": "none"}))
            handles.setdefault(name, handle)
        if off:
            axes.plot(*zip(*off, strict=True), **(style | {"linestyle": "none", "fillstyle": "none"}))
        return [t for _, t, _ in shown if t is not None]

    def medians(timings: list[Any]) -> list[float | None]:
        return [timing["median"] if isinstance(timing, dict) else None for timing in timings]

    seen = []
    for name, colour in colours.items():
        timings = medians([point["peers"].get(name) for point in points])
        seen += line(timings, name, color=colour, linewidth=1.2, marker="o", markersize=3.5, alpha=0.9)
    style = {"color": OURS, "linewidth": 2.4, "marker": "o", "markersize": 5.5, "zorder": 5}
    seen += line(medians([point["time"] for point in points]), f"{kernel} (ours)", **style)
    roofs = [point["roof"] for point in points]
    line(roofs, "roof", color="black", linewidth=1.2, linestyle="--", marker="_", markersize=9, zorder=4)

    axes.set_yscale("log")
    if seen:  # a roof far below every time would press the curves together
        axes.set_ylim(max(0.7 * min(roofs), 0.25 * min(seen)), 1.5 * max(seen))
    else:
        axes.text(0.5, 0.5, "not timed", transform=axes.transAxes, ha="center")
    low, high = axes.get_ylim()
    subs = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.10g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title("\n".join(fill(part, 44) for part in title.splitlines()), fontsize=8)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if joined:
        axes.set_xscale("log")
        axes.margins(x=0.08)
        axes.set_xlabel(axis, fontsize=8)
        labels = [_label(point, axis) for point in points]
    else:
        axes.set_xlim(-0.5, len(points) - 0.5)
        across = ACROSS.get(axis)
        labels = [(f"{point['sizes'][across]} × " if across else "") + _label(point, axis) for point in points]
        axes.set_xlabel(f"{across} × {axis}" if across else axis, fontsize=8)
    axes.set_xticks(places, labels, rotation=30 if max(map(len, labels)) > 5 else 0)
    axes.set_xticks([], minor=True)


def _place(point: Point, axis: str) -> float:
    return point["sizes"][axis]


def _label(point: Point, axis: str) -> str:
    sizes = point["sizes"]
    return f"{sizes['shortest']}–{sizes[axis]}" if "shortest" in sizes else str(sizes[axis])


def _text(sizes: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in sizes.items())
