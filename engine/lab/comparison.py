"""What two sets of kernels make of one model: tokens, logits, time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ...kernels.finding import BAD, GOOD, Finding, Table, new_figure

ALLOWED = 2
"""Times the error of one rounding, as for a single kernel in `kernels.check`."""
FEWEST_TURNS = 5
"""For a word on speed. Where nothing differs, so many turns all show the same sign in one comparison of 16."""


@dataclass(frozen=True)
class LogitError:
    """Of logits beside others: the largest difference, and the root mean square. NaN where some are not numbers."""

    largest: float
    rms: float


@dataclass(frozen=True)
class TextComparison:
    """One prompt. Both sets are fed the prompt and then a's greedy text, whatever b would have said.

    prompt, text:      words, or token ids where the model has no tokenizer
    tokens_a:          a's greedy token at each place of it
    tokens_b:          b's after the same tokens, −1 where its logits are not numbers
    first_difference:  the place in the text where b first says something else; None: nowhere
    margin:            there, by how much a's logit of its own token exceeds that of b's token: how close a call it was
    differing_words:   a's token and b's there, as words
    error:             of b's logits beside a's
    error_by_token:    the largest difference at each place
    """

    prompt: str
    text: str
    tokens_a: tuple[int, ...]
    tokens_b: tuple[int, ...]
    first_difference: int | None
    margin: float | None
    differing_words: tuple[str, str] | None
    error: LogitError
    error_by_token: tuple[float, ...]

    @property
    def same(self) -> int:
        """Places where both say the same token."""
        return sum(a == b for a, b in zip(self.tokens_a, self.tokens_b, strict=True))


@dataclass(frozen=True)
class Spread:
    """A median over the turns, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: tuple[float, ...]) -> Spread:
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ms ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True, repr=False)
class Comparison(Finding):
    """Two sets of kernels, a and b, in one model. `ok` is the verdict on b, with a taken for right.

    model, device, dtype:  what was run, and where
    changed:               the operators that b runs otherwise: name → (a's implementation, b's)
    texts:                 one for each prompt
    error:                 of b's logits beside a's, over all texts
    rounding:              what a's logits move by when every operator rounds its result once more: the error of
                           the dtype itself. b's may be twice that
    ms_a, ms_b:            milliseconds of a decode step of all prompts together, one entry a turn, in the turns
                           a b a b; empty where no turn was asked for
    """

    kind = "comparison"

    model: str
    device: str
    dtype: str
    changed: Mapping[str, tuple[str, str]]
    texts: tuple[TextComparison, ...]
    error: LogitError
    rounding: LogitError
    ms_a: tuple[float, ...]
    ms_b: tuple[float, ...]

    @property
    def ok(self) -> bool:
        """Whether b's logits are numbers, and err beside a's at most twice as much as one rounding more makes them."""
        return (
            self.error.largest <= ALLOWED * self.rounding.largest and self.error.rms <= ALLOWED * self.rounding.rms
        )  # NaN is not

    @property
    def same_tokens(self) -> float:
        """The share of places where both say the same token after the same tokens."""
        return sum(text.same for text in self.texts) / sum(len(text.tokens_a) for text in self.texts)

    @property
    def first_difference(self) -> int | None:
        """The first place at which a text differs; None: nowhere."""
        return min((t.first_difference for t in self.texts if t.first_difference is not None), default=None)

    @property
    def a(self) -> Spread | None:
        """Milliseconds a token; None where there was no turn."""
        return Spread.of(self.ms_a) if self.ms_a else None

    @property
    def b(self) -> Spread | None:
        return Spread.of(self.ms_b) if self.ms_b else None

    @property
    def delta(self) -> Spread | None:
        """Milliseconds a token that b takes longer than a in the turn beside it; below 0 b is faster."""
        return Spread.of(tuple(b - a for a, b in zip(self.ms_a, self.ms_b, strict=True))) if self.ms_a else None

    @property
    def verdict(self) -> str:
        """In a line."""
        changed = ", ".join(f"{op}: {a} → {b}" for op, (a, b) in self.changed.items()) or "nothing is changed"
        if not math.isfinite(self.error.largest):
            return f"b's logits are not numbers ({changed})"
        if not self.ok:
            times = self.error.rms / self.rounding.rms if self.rounding.rms else math.inf
            return f"b's logits are off by {times:.3g} times one rounding; {ALLOWED} are allowed ({changed})"
        return f"b is as right as a, {self.same_tokens:.1%} equal tokens{self._pace()} ({changed})"

    def _pace(self) -> str:
        if self.delta is None:
            return ""
        share = self.delta.median / self.a.median
        if len(self.ms_a) < FEWEST_TURNS:
            return f", in fewer than {FEWEST_TURNS} turns no word on its speed"
        if self.delta.low <= 0 <= self.delta.high:
            return f", no difference in time beyond its spread ({share:+.1%})"
        return f", {abs(share):.1%} {'slower' if share > 0 else 'faster'}"

    def table(self) -> Table:
        head = ("prompt", "tokens", "equal", "first to differ", "margin there", "logit error", "rms")
        rows = []
        for text in self.texts:
            where = ("nowhere", "–")
            if text.first_difference is not None:
                said = " / ".join(map(repr, text.differing_words))
                where = (f"{text.first_difference}: {said}", "–" if text.margin is None else f"{text.margin:.3g}")
            prompt = text.prompt if len(text.prompt) <= 40 else text.prompt[:39] + "…"
            numbers = (f"{text.error.largest:.2e}", f"{text.error.rms:.2e}")
            rows.append((repr(prompt), str(len(text.tokens_a)), str(text.same), *where, *numbers))
        notes = [
            f"  all logits: error {self.error.largest:.2e}, rms {self.error.rms:.2e}; one rounding more makes "
            f"{self.rounding.largest:.2e}, rms {self.rounding.rms:.2e}; {ALLOWED} times that is allowed"
        ]
        if self.delta is not None:
            notes.append(f"  a token: a {self.a}, b {self.b}, b − a {self.delta}, over {len(self.ms_a)} turns each")
        title = f"{self.model} in {self.dtype} on {self.device}: {self.verdict}"
        bad = frozenset(i for i, t in enumerate(self.texts) if not t.error.largest <= ALLOWED * self.rounding.largest)
        return Table(title, head, tuple(rows), words=1, notes=tuple(notes), bad=bad, ok=self.ok)

    def record(self) -> dict[str, Any]:
        about = {"verdict": self.verdict, "ok": self.ok, "same_tokens": self.same_tokens, "allowed": ALLOWED}
        times = {name: asdict(spread) if (spread := getattr(self, name)) else None for name in ("a", "b", "delta")}
        return {**about, **asdict(self), "ms_a_token": times}

    def plot(self) -> Any:
        """The logit error along each text beside that of one rounding, and the time of each turn."""
        figure = new_figure(9 if self.ms_a else 6, 3.4)
        axes, *rest = figure.subplots(
            1, 2 if self.ms_a else 1, width_ratios=[2, 1][: 2 if self.ms_a else 1], squeeze=0
        )[0]
        for i, text in enumerate(self.texts):
            axes.plot(text.error_by_token, linewidth=1, label=f"prompt {i}")
            if text.first_difference is not None:
                place = text.first_difference
                axes.plot(place, text.error_by_token[place], "o", color=BAD, markersize=5)
        axes.axhline(ALLOWED * self.rounding.largest, color="black", linestyle="--", linewidth=1, label="allowed")
        axes.axhline(self.rounding.largest, color="#888888", linestyle=":", linewidth=1, label="one rounding")
        if any(error > 0 for text in self.texts for error in text.error_by_token):
            axes.set_yscale("log")
        axes.set_xlabel("token of the text (dot: the first that differs)", fontsize=8)
        axes.set_ylabel("largest logit error", fontsize=8)
        axes.legend(fontsize=7, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
        if rest:
            (times,) = rest
            times.plot(self.ms_a, "o-", color="#4361ee", label="a")
            times.plot(self.ms_b, "o-", color=GOOD, label="b")
            times.set_xticks(range(len(self.ms_a)))
            times.set_xlabel("turn", fontsize=8)
            times.set_ylabel("ms a token", fontsize=8)
            times.legend(fontsize=7, frameon=False)
        figure.suptitle(f"{self.model} in {self.dtype}: {self.verdict}", fontsize=9, wrap=True)
        for panel in (axes, *rest):
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
        return figure
