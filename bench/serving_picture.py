"""A picture of a serving record: latencies and throughput against concurrency, ours beside the peer."""

from __future__ import annotations

from statistics import median
from typing import Any

from microvllm.kernels.measurement_picture import OURS as OUR_COLOUR
from microvllm.kernels.measurement_picture import PEER_COLOURS

from .serving_metrics import LATENCIES

STYLES = {"median": "-", "p90": "--", "p99": ":"}


def serving_figure(record: dict[str, Any]) -> Any:
    """A panel for each latency, with medians over turns of STYLES, and one for the tokens/s of all requests.

    Cases stand side by side in their order, which need not be that of their concurrency.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator

    points = record["points"]
    servers = list(points[0]["turns"])
    colours = dict(zip(servers, (OUR_COLOUR, *PEER_COLOURS), strict=False))
    figure = Figure(figsize=(3.1 * (len(LATENCIES) + 1), 4.2), layout="constrained")
    *panels, throughput = figure.subplots(1, len(LATENCIES) + 1)
    for axes, (name, words) in zip(panels, LATENCIES.items(), strict=True):
        for server, colour in colours.items():
            for what, style in STYLES.items():
                times = [_middle(point, server, f"{what}_{name}_ms") for point in points]
                axes.plot(times, color=colour, linestyle=style, marker="o", markersize=3.5)
        axes.set_title(f"{words}, ms", fontsize=9)
    for server, colour in colours.items():
        rates = [_middle(point, server, "output_throughput") for point in points]
        throughput.plot(rates, color=colour, marker="o", markersize=3.5)
    if all(point["offline"] for point in points):
        rates = [median(point["offline"]) for point in points]
        throughput.plot(rates, color="black", linestyle="-.", marker="_", label="our engine offline")
        throughput.legend(frameon=False, fontsize=7)
    throughput.set_title("output tokens/s", fontsize=9)
    for axes in (*panels, throughput):
        if axes.dataLim.ymax > 0:  # a latency of short answers that came at once is 0
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 8 * low else range(1, 10), numticks=20))
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.10g}")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xticks(range(len(points)), [f"{point['case']}\n{point['about']}" for point in points])
        axes.set_xlabel("case, prompt / output tokens", fontsize=7)
        axes.margins(x=0.15)
        axes.tick_params(which="both", labelsize=7)
        axes.grid(True, axis="y", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    lines = [Line2D([], [], color=colour, label=server) for server, colour in colours.items()]
    lines += [Line2D([], [], color="black", linestyle=style, label=what) for what, style in STYLES.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=8)
    return figure


def _middle(point: dict[str, Any], server: str, key: str) -> float:
    return median(turn[key] for turn in point["turns"][server])
