"""What a comparison of servers says, as rows of tables and as points of a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .engines import OURS
from .serving_metrics import LATENCIES, PERCENTILES
from .workloads import Workload


@dataclass(frozen=True)
class Comparison:
    """The figures of each server's turns at a workload.

    turns:    by the server's name
    offline:  output tokens/s of our engine without a server, one for each turn; empty where it was not asked
    """

    workload: Workload
    turns: Mapping[str, Sequence[Mapping[str, Any]]]
    offline: Sequence[float] = ()

    def median(self, server: str, key: str) -> float:
        return median(turn[key] for turn in self.turns[server])

    def spread(self, server: str, key: str) -> str:
        """Half the distance of the extremes, of the median; nothing of a median of 0."""
        values = [turn[key] for turn in self.turns[server]]
        return f"±{(max(values) - min(values)) / 2 / median(values):.1%}" if median(values) else ""


def rows(comparison: Comparison, peer: str | None) -> list[dict[str, Any]]:
    """A row for each server: medians of its turns. × peer is over 1 where it is faster, for times and rates alike."""
    shown = []
    for server, turns in comparison.turns.items():

        def middle(key: str, server: str = server) -> float:
            return comparison.median(server, key)

        row = {"case": comparison.workload.name, "prompt / output": str(comparison.workload), "server": server}
        row |= {"TTFT ms": middle("median_ttft_ms"), "TTFT p99": middle("p99_ttft_ms")}
        row |= {"TPOT ms": middle("median_tpot_ms"), "TPOT ±": comparison.spread(server, "median_tpot_ms")}
        row |= {"TPOT p99": middle("p99_tpot_ms"), "ITL p99": middle("p99_itl_ms"), "E2EL ms": middle("median_e2el_ms")}
        row |= {"tokens/s": middle("output_throughput"), "±": comparison.spread(server, "output_throughput")}
        if peer:
            # A server that sends all tokens in one event takes no time between them.
            tpot = row["TPOT ms"]
            row[f"TPOT × {peer}"] = comparison.median(peer, "median_tpot_ms") / tpot if tpot else ""
            row[f"tokens/s × {peer}"] = row["tokens/s"] / comparison.median(peer, "output_throughput")
        if comparison.offline:
            row["of offline"] = f"{row['tokens/s'] / median(comparison.offline):.1%}" if server == OURS else ""
        if turns[0]["request_goodput"] is not None:
            row["goodput req/s"] = middle("request_goodput")
        row |= {"failed": sum(turn["failed"] for turn in turns), "client CPU": f"{middle('cpu_share'):.0%}"}
        shown.append(row)
    return shown


def latency_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each latency of each server, in ms: medians over its turns."""
    statistics = ("mean", "median", *(f"p{q}" for q in PERCENTILES))
    return [
        {"case": comparison.workload.name, "server": server, "ms": words}
        | {what: comparison.median(server, f"{what}_{name}_ms") for what in statistics}
        for name, words in LATENCIES.items()
        for server in comparison.turns
    ]


def point(comparison: Comparison) -> dict[str, Any]:
    """All that was measured: for pictures, and for whoever reads vLLM's files."""
    workload = comparison.workload
    about = {"case": workload.name, "about": str(workload), "requests": workload.requests}
    return about | {"turns": dict(comparison.turns), "offline": list(comparison.offline)}
