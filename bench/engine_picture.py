"""Pictures of the engine's records, and of the server's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from microvllm.kernels.measurement_picture import OURS as OUR_COLOUR
from microvllm.kernels.measurement_picture import PEER_COLOURS

from .serving_picture import serving_figure

PALE = "#ced4da"
PART_COLOURS = (OUR_COLOUR, *PEER_COLOURS[:4], *PEER_COLOURS[5:], "#f15bb5", "#606c38", "#7f4f24", "#84dcc6")
"""Of a step's parts: all but the grey of the peers'."""
GREYS = ("#343a40", "#868e96", PALE)
UNITS = {"prefill": (1e3, "ms to the first token of all"), "step": (1e3, "ms a step"), "rate": (1, "tokens/s")}
"""By a field of Turn: what it is multiplied by to be shown, and in which unit that is."""
PANELS = {
    "tokens/s": ("tokens/s", None),
    "first token after, s: mean and 99th percentile": ("first token s", "first token 99 % s"),
    "complete after, s: mean and 99th percentile": ("completion s", "completion 99 % s"),
    "longest wait for a token, s": ("longest wait s", None),
}
"""Of policies, by title: the column of the bars, and that of the marks beside them."""


def draw(record: dict[str, Any], path: Path) -> Path:
    """Draws a record of the kind that it says and returns the path. ModuleNotFoundError without matplotlib."""
    figure = FIGURES[record["kind"]](record)
    figure.suptitle(f"{record['model']} in {record['dtype']}\n{record['device']}; {record['date']}, "
                    f"commit {record['commit']}", fontsize=9)  # fmt: skip
    figure.savefig(path, dpi=130)
    return path


def cases_figure(record: dict[str, Any]) -> Any:
    """Medians of each engine, from the least to the most of its turns, and where it is known the floor.

    Steps are shown in ms; what differs widely between cases is shown over the peer's median, where there is a peer.
    """
    from matplotlib.figure import Figure

    points = record["points"]
    turns = [turn for point in points for turns in point["turns"].values() for turn in turns]
    shown = ("prefill",) if any(turn["step"] is None for turn in turns) else ("step", "rate")
    figure = Figure(figsize=(1.8 + 4.4 * len(shown), 1.6 + 0.55 * len(points)), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for what, axes in zip(shown, panels, strict=True):
        _draw_bars(axes, points, what)
    panels[0].set_yticks(range(len(points)), [f"{point['case']}\n{point['about']}" for point in points], fontsize=7)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return figure


def _draw_bars(axes: Any, points: Sequence[dict[str, Any]], what: str) -> None:
    factor, unit = UNITS[what]
    engines = list(points[0]["turns"])
    peer = engines[1] if len(engines) > 1 and what != "step" else None
    height = 0.8 / len(engines)
    for i, engine in enumerate(engines):
        for place, point in enumerate(points):
            turns = {name: [turn[what] * factor for turn in turns] for name, turns in point["turns"].items()}
            whole = median(turns[peer]) if peer else 1
            low, middle, high = (f(turns[engine]) / whole for f in (min, median, max))
            y = place + (i - (len(engines) - 1) / 2) * height
            axes.barh(y, middle, height, color=PEER_COLOURS[i - 1] if i else OUR_COLOUR, label="" if place else engine)
            axes.plot([low, high], [y, y], color="black", linewidth=0.8)
            axes.annotate(_figure(middle * whole), (high, y), (4, 0), textcoords="offset points", va="center", size=6)
            if what == "step" and point["floor"]:
                label = "" if i or place else "memory floor"
                axes.vlines(
                    point["floor"] * factor, y - height / 2, y + height / 2, "black", linewidths=1.5, label=label
                )
    axes.margins(x=0.15)
    axes.set_xlabel(f"{unit}, × {peer}'s" if peer else unit, fontsize=8)
    _plain(axes)


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _plain(axes: Any) -> None:
    axes.tick_params(labelsize=7)
    axes.grid(True, axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def policies_figure(record: dict[str, Any]) -> Any:
    """A bar for each policy, the best in red."""
    from matplotlib.figure import Figure

    ways = list(dict.fromkeys(row["arrivals"] for row in record["rows"]))
    figure = Figure(figsize=(13, 0.9 + 2.2 * len(ways)), layout="constrained")
    for way, line in zip(ways, figure.subplots(len(ways), len(PANELS), squeeze=False, sharey="row"), strict=True):
        rows = [row for row in record["rows"] if row["arrivals"] == way]
        for axes, (title, (column, tail)) in zip(line, PANELS.items(), strict=True):
            values = [row[column] for row in rows]
            best = max(values) if column == "tokens/s" else min(values)
            axes.barh(range(len(rows)), values, color=[OUR_COLOUR if v == best else PALE for v in values])
            for y, value in enumerate(values):
                axes.annotate(_figure(value), (0, y), (3, 0), textcoords="offset points", va="center", size=6)
            if tail:
                axes.plot([row[tail] for row in rows], range(len(rows)), "k|", markersize=10)
            axes.set_xlabel(title, fontsize=8)
            _plain(axes)
        line[0].set_yticks(range(len(rows)), [f"{row['policy']}, {row['window']}" for row in rows])
        line[0].invert_yaxis()
        line[0].set_title(f"arriving {way}", fontsize=8, loc="left")
    return figure


def profile_figure(record: dict[str, Any]) -> Any:
    """For each workload a bar of the step's parts as the profiler saw them, operators in colour, and one of the host's
    parts without it. Where the roof of every operator is known, a dashed line is what they take at it.
    """
    from matplotlib.figure import Figure

    points = record["points"]
    figure = Figure(figsize=(13, 2.2 + 0.6 * len(points)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    operators = [[line for line in point["lines"] if line["calls"] is not None] for point in points]
    names = [line["name"] for lines in operators for line in lines]
    _stack(panels[0], [{line["name"]: line["seconds"] for line in point["lines"]} for point in points], names)
    _stack(panels[1], [point["host"] for point in points], list(points[0]["host"]))
    for axes, title in zip(panels, ("a step, with the profiler", "the host's part, without the profiler"), strict=True):
        steps = [point["step"] * 1e3 for point in points]
        _ticks(axes, steps, "step without the profiler")
        axes.set_xlabel(f"ms: {title}", fontsize=8)
        _plain(axes)
    floors = [[line["floor"] for line in lines] for lines in operators]
    if not any(None in floor for floor in floors):
        _ticks(panels[0], [sum(floor) * 1e3 for floor in floors], "operators at the roof", linestyles="dashed")
    for axes in panels:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=4, frameon=False, fontsize=7)
    panels[0].set_yticks(range(len(points)), [f"{point['case']}\n{point['about']}" for point in points])
    panels[0].invert_yaxis()
    return figure


def _stack(axes: Any, bars: Sequence[dict[str, float]], coloured: Sequence[str]) -> None:
    """Bars of parts in seconds, side by side in ms; those that are not coloured are grey."""
    names = dict.fromkeys(name for bar in bars for name in bar)
    colours = dict(zip(dict.fromkeys(coloured), cycle(PART_COLOURS), strict=False))
    colours |= dict(zip((name for name in names if name not in colours), cycle(GREYS), strict=False))
    left = [0.0] * len(bars)
    for name in names:
        widths = [bar.get(name, 0.0) * 1e3 for bar in bars]
        axes.barh(range(len(bars)), widths, 0.6, left=left, color=colours[name], label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]


def _ticks(axes: Any, places: Sequence[float], label: str, **style: Any) -> None:
    bars = range(len(places))
    axes.vlines(places, [y - 0.35 for y in bars], [y + 0.35 for y in bars], "black", label=label, **style)


FIGURES = {"cases": cases_figure, "policies": policies_figure, "profile": profile_figure, "serving": serving_figure}
"""By the kind that a record says it is."""
