"""What a decode step's time goes to: its operators, what lies between them, and the host's work beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

from microvllm.kernels.op import Cost
from microvllm.kernels.roof import Roof

from .device_trace import GAPS, OUTSIDE, UNKNOWN
from .operator_calls import total
from .steady_decode import HOST
from .workloads import Workload

TOLERANCE = 0.05
"""The profiled step may differ from the other by this share of it, or the profile is of another step."""

Parts = dict[tuple[str, str], float]
"""Seconds of one step by (what of, kernel); the kernel is empty where there is none."""


@dataclass(frozen=True)
class Line:
    """A part of a step.

    calls, moved:  of an operator: its calls a step, and the bytes that they must move, where these are known
    floor:         seconds that the calls take at the GPU's best
    kernels:       seconds by kernel
    """

    name: str
    seconds: float
    calls: int | None = None
    moved: float | None = None
    floor: float | None = None
    kernels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """lines: the parts of the step with the profiler, which they add up to
    host:     seconds of the host's parts of a step without the profiler, likewise
    """

    workload: Workload
    lines: list[Line]
    host: dict[str, float]

    @property
    def sum(self) -> float:
        return sum(line.seconds for line in self.lines)

    @property
    def step(self) -> float:
        """Seconds of a step without the profiler."""
        return sum(self.host.values())

    @property
    def excess(self) -> float:
        """By how much the sum is over the step, as a share of the step."""
        return self.sum / self.step - 1

    def verdict(self) -> str:
        words = f"the sum is {abs(self.excess):.1%} {'over' if self.excess > 0 else 'under'} the step"
        if abs(self.excess) <= TOLERANCE:
            return words
        return (
            f"NOT A PROFILE OF THIS STEP: {words}, more than {TOLERANCE:.0%}: the profiler or the machine disturbed it"
        )


def middle_half(steps: list[dict]) -> dict:
    """The mean of each part over the steps whose time is in the middle half: means add up, and outliers are out."""
    ordered = sorted(steps, key=lambda parts: sum(parts.values()))
    ordered = ordered[len(ordered) // 4 : len(ordered) - len(ordered) // 4]
    names = dict.fromkeys(name for parts in ordered for name in parts)
    return {name: mean(parts.get(name, 0.0) for parts in ordered) for name in names}


def lines(parts: Parts, costs: list[dict[str, list[Cost | None]]], roof: Roof | None) -> list[Line]:
    """The operators, the longest first, and then what is none.

    costs: of each operator's calls in a step, for several steps, whose mean counts
    """
    kernels: dict[str, dict[str, float]] = {}
    for (name, kernel), seconds in parts.items():
        kernels.setdefault(name, {})[kernel] = seconds
    rest = [name for name in (OUTSIDE, UNKNOWN, *HOST, GAPS) if name in kernels]
    operators = sorted((name for name in kernels if name not in rest), key=lambda name: -sum(kernels[name].values()))
    found = []
    for name in [*operators, *rest]:
        about: dict[str, Any] = {"kernels": {kernel: t for kernel, t in kernels[name].items() if kernel}}
        if name in costs[0]:
            about["calls"] = len(costs[0][name])
            if None not in costs[0][name]:
                whole = [total(step[name]) for step in costs]
                about["moved"] = mean(cost.read + cost.written for cost in whole)
                if roof is not None:
                    about["floor"] = mean(sum(map(roof.time, step[name])) for step in costs)
        found.append(Line(name, sum(kernels[name].values()), **about))
    return found


def rows(profile: Profile) -> list[dict[str, Any]]:
    """The lines, their sum, the step without the profiler, and the host's parts of that one."""
    operators = [line for line in profile.lines if line.calls is not None]
    whole = Line("sum", profile.sum, moved=_sum(operators, "moved"), floor=_sum(operators, "floor"))
    step = Line("step without the profiler", profile.step)
    host = [Line(f"host: {name}", seconds) for name, seconds in profile.host.items()]
    return [
        {
            "case": profile.workload.name,
            "part": line.name,
            "calls": "–" if line.calls is None else line.calls,
            "µs": line.seconds * 1e6,
            "% of step": f"{line.seconds / profile.step:.1%}",
            "MB": "–" if line.moved is None else line.moved / 1e6,
            "% of roof": "–" if not (line.floor and line.seconds) else f"{line.floor / line.seconds:.1%}",
        }
        for line in [*profile.lines, whole, step, *host]
    ]


def _sum(operators: list[Line], what: str) -> float | None:
    values = [getattr(line, what) for line in operators]
    return None if None in values else sum(values)


def words(profile: Profile) -> str:
    """Whether the sum is the step, and the kernels that belong to no operator."""
    text = [profile.verdict()]
    for line in profile.lines:
        if line.name in (OUTSIDE, UNKNOWN):
            text += [f"{line.name}: {t * 1e6:.2f} µs {_short(kernel)}" for kernel, t in line.kernels.items()]
    return "\n".join(text)


def _short(kernel: str, width: int = 90) -> str:
    return kernel if len(kernel) <= width else kernel[: width - 1] + "…"


def point(profile: Profile) -> dict[str, Any]:
    """All that was measured, in seconds and bytes, for pictures."""
    workload = profile.workload
    return {
        "case": workload.name,
        "about": f"{workload.requests} × prompt {replace(workload, tokens=1)}",
        "step": profile.step,
        "sum": profile.sum,
        "lines": [vars(line) for line in profile.lines],
        "host": profile.host,
    }
