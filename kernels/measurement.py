"""The times of a kernel, case by case."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .finding import Finding, Table
from .measurement_picture import figure_of
from .op import Case, Cost
from .origin import origin
from .report import dtype_name
from .roof import Roof
from .timing import Timing


@dataclass(frozen=True)
class Row:
    """One case. `timing` and the values of `peers` are words where there is no time.

    clock:           MHz of the multiprocessors while it was timed, the lowest and the highest; None where not known
    error, allowed:  as `check` found them before it was timed; NaN where nothing was
    """

    case: Case
    dtype: torch.dtype
    cost: Cost
    roof: Roof
    timing: Timing | str
    peers: Mapping[str, Timing | str] = field(default_factory=dict)
    clock: tuple[int, int] | None = None
    error: float = math.nan
    allowed: float = math.nan

    @property
    def share(self) -> float:
        """Of the roof: 1 is as fast as can be."""
        return self.roof.time(self.cost) / (self.timing.median * 1e-6)

    @property
    def over_launch(self) -> float:
        """Microseconds over an empty kernel."""
        return self.timing.median - self.roof.launch * 1e6

    @property
    def rate(self) -> tuple[float, str]:
        """TB/s, or TFLOP/s where the roof is that of arithmetic."""
        seconds = self.timing.median * 1e-6
        if self.cost.flops / self.roof.flops > self.roof.memory_time(self.cost):
            return self.cost.flops / seconds / 1e12, "TFLOP/s"
        return (self.cost.read + self.cost.written) / seconds / 1e12, "TB/s"

    @property
    def fastest(self) -> tuple[str, Timing] | None:
        """The fastest peer."""
        timed = [(name, timing) for name, timing in self.peers.items() if isinstance(timing, Timing)]
        return min(timed, key=lambda entry: entry[1].median, default=None)

    def ratio(self, peer: Timing) -> float:
        """Our time over the peer's: below 1 we are faster."""
        return self.timing.median / peer.median

    def record(self) -> dict[str, Any]:
        """All that was measured: times in µs, words where there is none."""

        def time_of(timing: Timing | str) -> dict[str, float] | str:
            return asdict(timing) if isinstance(timing, Timing) else timing

        return {
            "sizes": dict(self.case.sizes),
            "cost": asdict(self.cost),
            "roof": self.roof.time(self.cost) * 1e6,
            "time": time_of(self.timing),
            "peers": {name: time_of(timing) for name, timing in self.peers.items()},
            "clock": self.clock,
            "error": None if math.isnan(self.error) else self.error,
            "allowed": None if math.isnan(self.allowed) else self.allowed,
        }


@dataclass(frozen=True, repr=False)
class Measurement(Finding):
    """The times of a kernel; `print(measurement)` shows them as a table. A peer's column has its µs and, after ×, our
    time over its time; what was not timed and why stands below, in words.
    """

    kind = "measurement"

    operator: str
    kernel: str
    rows: tuple[Row, ...]
    device: str

    def table(self) -> Table:
        names = list(dict.fromkeys(name for row in self.rows for name in row.peers))
        head = ("case", "dtype", "µs", "10–90 %", "over empty", "rate", "% of roof", *names)
        lines: list[tuple[str, ...]] = []
        notes: dict[str, None] = {}
        for row in self.rows:
            start = (str(row.case), dtype_name(row.dtype))
            if isinstance(row.timing, str):
                notes[f"{row.case}: {row.timing}"] = None
                lines.append((*start, *["–"] * (5 + len(names))))
                continue
            rate, unit = row.rate
            spread = f"{_digits(row.timing.low)}–{_digits(row.timing.high)}"
            cells = (_digits(row.timing.median), spread, _digits(row.over_launch), f"{_digits(rate)} {unit}")
            shown = []
            for name in names:
                peer = row.peers.get(name, "not measured")
                if isinstance(peer, str):
                    notes[f"{name}: {peer}"] = None
                shown.append("–" if isinstance(peer, str) else f"{_digits(peer.median)} ×{row.ratio(peer):.2f}")
            lines.append((*start, *cells, f"{row.share:.1%}"[:-1], *shown))
        timed = [row for row in self.rows if isinstance(row.timing, Timing)]
        if clocks := [clock for row in timed for clock in row.clock or ()]:
            notes[f"clock of the multiprocessors: {min(clocks)} to {max(clocks)} MHz"] = None
        elif timed:
            notes["clock of the multiprocessors: not known (nvidia-ml-py is missing, or cannot read it)"] = None
        return Table(f"{self.operator}: {self.kernel}", head, tuple(lines), notes=tuple(f"  {note}" for note in notes))

    def record(self) -> dict[str, Any]:
        return {
            "operator": self.operator,
            "kernel": self.kernel,
            "device": self.device,
            "dtype": dtype_name(self.rows[0].dtype) if self.rows else None,
            "roof": asdict(self.rows[0].roof) if self.rows else None,
            "points": [row.record() for row in self.rows],
        }

    def plot(self) -> Any:
        """Times against size or context, beside the peers and the roof."""
        if not self.rows:
            raise ValueError(f"{self.operator}: nothing was measured, and there is nothing to draw")
        return figure_of({**origin(), **self.record()})


def _digits(x: float) -> str:
    """About three significant digits: 0.0123, 7.31, 23.5, 151, 1,234."""
    size = abs(x)
    return f"{x:,.0f}" if size >= 100 else f"{x:.1f}" if size >= 10 else f"{x:.2f}" if size >= 1 else f"{x:.3g}"
