"""The verdicts on a kernel, case by case."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .finding import BAD, GOOD, Finding, Table, new_figure
from .op import Case

# The problems, by the names that a report gives them.
WRONG_VALUES = "wrong values"
NAN = "NaN"
UNWRITTEN = "unwritten output"
STALE = "stale output"
CHANGED = "changed argument"
OUT_OF_BOUNDS = "written out of bounds"
NOT_DETERMINISTIC = "not deterministic"
WRONG_SHAPE = "wrong shape"
WRONG_DTYPE = "wrong dtype"
RAISED = "raised"


@dataclass(frozen=True)
class Problem:
    """What is wrong, by one of the names above, and where."""

    name: str
    where: str


@dataclass(frozen=True)
class Result:
    """The verdict on one case in one dtype.

    error, allowed:  the largest error and its bound, in the tensor that exceeds its bounds most or comes closest to
                     them; for integers the number of wrong elements and 0; NaN where there is no error to speak of
    refused:         why the implementation does not take the case, in its own words; nothing was run then
    reproduce:       the call that checks this case alone
    """

    case: Case
    dtype: torch.dtype
    error: float = math.nan
    allowed: float = math.nan
    problems: tuple[Problem, ...] = ()
    refused: str | None = None
    reproduce: str = ""

    @property
    def verdict(self) -> str:
        if self.refused is not None:
            return f"refused: {self.refused}"
        return ", ".join(dict.fromkeys(problem.name for problem in self.problems)) or "right"

    def record(self) -> dict[str, Any]:
        return {
            "sizes": dict(self.case.sizes),
            "dtype": dtype_name(self.dtype),
            "error": self.error,
            "allowed": self.allowed,
            "verdict": self.verdict,
            "problems": [asdict(problem) for problem in self.problems],
            "reproduce": self.reproduce,
        }


@dataclass(frozen=True, repr=False)
class Report(Finding):
    """The verdicts on a kernel. Its text is a table and, below it, the places where the kernel is wrong."""

    kind = "check"

    title: str
    results: tuple[Result, ...]
    device: str

    @property
    def ok(self) -> bool:
        """Whether at least one case was judged, and none has a problem."""
        judged = [result for result in self.results if result.refused is None]
        return bool(judged) and not any(result.problems for result in judged)

    @property
    def problems(self) -> set[str]:
        """The names of all problems."""
        return {problem.name for result in self.results for problem in result.problems}

    def table(self) -> Table:
        wrong = [result for result in self.results if result.problems]
        refused = sum(result.refused is not None for result in self.results)
        right = len(self.results) - len(wrong) - refused
        rows = []
        for result in self.results:
            numbers = ("", "") if math.isnan(result.error) else (f"{result.error:.2e}", f"{result.allowed:.2e}")
            rows.append((str(result.case), dtype_name(result.dtype), *numbers, result.verdict))
        notes = []
        for result in wrong:
            notes += ["", f"{result.case}, {dtype_name(result.dtype)}"]
            notes += [f"  {problem.name}: {problem.where}" for problem in result.problems]
            notes += [f"  again: {result.reproduce}"]
        return Table(
            f"{self.title}: {right} right, {len(wrong)} wrong, {refused} refused",
            ("case", "dtype", "error", "allowed", "verdict"),
            tuple(rows),
            last_words=True,
            notes=tuple(notes),
            bad=frozenset(i for i, result in enumerate(self.results) if result.problems),
            ok=self.ok,
        )

    def record(self) -> dict[str, Any]:
        results = [result.record() for result in self.results]
        return {"title": self.title, "device": self.device, "ok": self.ok, "results": results}

    def plot(self) -> Any:
        """Each case's error as a share of what is allowed, in each dtype; what cannot be drawn stands in words."""
        rows = self.results
        figure = new_figure(7, 1.2 + 0.24 * max(1, len(rows)))
        axes = figure.subplots()
        shares = [_share(result) for result in rows]
        drawn = [share for share in shares if share is not None and 0 < share < math.inf]
        low, high = min([0.1, *drawn]) / 2, max([1.0, *drawn]) * 2
        for i, (result, share) in enumerate(zip(rows, shares, strict=True)):
            colour = BAD if result.problems else GOOD
            if share is None or not share < math.inf:
                axes.text(low, i, f" {result.verdict}", color=colour, fontsize=7, va="center")
            else:
                axes.barh(i, max(share, low), left=0, height=0.6, color=colour)
        axes.axvline(1, color="black", linestyle="--", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_yticks(range(len(rows)), [f"{result.case}, {dtype_name(result.dtype)}" for result in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("error, of what is allowed", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(self.table().title, fontsize=9)
        return figure


def _share(result: Result) -> float | None:
    """Of what is allowed; None where there is no error to speak of."""
    if math.isnan(result.error) or math.isnan(result.allowed):
        return None
    return result.error / result.allowed if result.allowed else (math.inf if result.error else 0.0)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
