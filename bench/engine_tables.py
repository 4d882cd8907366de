"""What a comparison of engines says, as rows of a table and as points of a picture."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .turns import Comparison


def brief_rows(comparison: Comparison, peer: str | None) -> list[dict[str, Any]]:
    """A workload that was given on the command line; a row for each engine."""
    rows = []
    for name in comparison.turns:
        row = {"requests": comparison.workload.requests, "engine": name}
        row |= {"prefill s": comparison.median(name, "prefill"), "ms a step": comparison.median(name, "step") * 1e3}
        row |= {"tokens/s": comparison.median(name, "rate"), "spread": comparison.spread(name, "rate")}
        rows.append(row | ({f"× {peer}": comparison.gain(name, peer, "rate")} if peer else {}))
    return rows


def decode_rows(comparison: Comparison, peer: str | None) -> list[dict[str, Any]]:
    """A named workload; gains are of tokens/s and of ms a step, over 1 where the engine is faster."""
    rows = []
    for name in comparison.turns:
        row = {"case": comparison.workload.name, "prompt / output": str(comparison.workload), "engine": name}
        row |= {"prefill s": comparison.median(name, "prefill"), "prefill ±": comparison.spread(name, "prefill")}
        row |= {"ms a step": comparison.median(name, "step") * 1e3, "step ±": comparison.spread(name, "step")}
        row |= {"tokens/s": comparison.median(name, "rate"), "tokens/s ±": comparison.spread(name, "rate")}
        if peer:
            row[f"tokens/s × {peer}"] = comparison.gain(name, peer, "rate")
            row[f"step × {peer}"] = comparison.gain(name, peer, "step")
        if comparison.floor is not None:
            row["% of floor"] = f"{comparison.floor / comparison.median(name, 'step'):.1%}"
        rows.append(row)
    return rows


def prefill_rows(comparison: Comparison, peer: str | None) -> list[dict[str, Any]]:
    """A workload of prefill alone: the time to the first token of all."""
    rows = []
    for name in comparison.turns:
        row = {"case": comparison.workload.name, "prompt": str(comparison.workload), "engine": name}
        row |= {"prefill s": comparison.median(name, "prefill"), "spread": comparison.spread(name, "prefill")}
        row |= {"prompt tokens/s": comparison.median(name, "rate")}
        rows.append(row | ({f"× {peer}": comparison.gain(name, peer, "prefill")} if peer else {}))
    return rows


def point(comparison: Comparison) -> dict[str, Any]:
    """All that was measured, in seconds, for pictures."""
    turns = {name: [asdict(turn) for turn in turns] for name, turns in comparison.turns.items()}
    workload = comparison.workload
    return {"case": workload.name, "about": str(workload), "floor": comparison.floor, "turns": turns}
