"""Scheduling policies: in which order requests are admitted, and which decode together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .sequence import Sequence


def _by_arrival(seq: Sequence) -> tuple[int, ...]:
    return (seq.id,)


def _by_work_left(seq: Sequence) -> tuple[int, ...]:
    return (seq.work_left, seq.id)


@dataclass(frozen=True)
class Policy:
    """name:  what it is called
    order:    sorts requests for admission, the first one first
    window:   a decode batch holds the shortest sequence and those at most so many tokens longer; None holds all
    """

    name: str
    order: Callable[[Sequence], tuple[int, ...]]
    window: int | None = None


POLICIES = ("fcfs", "sjf", "sjf_aligned")


def make_policy(name: str, window: int | None = None) -> Policy:
    """`fcfs`: first come, first served. `sjf`: least work left first. `sjf_aligned`: sjf, decoding in aligned batches.

    window: tokens, of sjf_aligned alone. ValueError for another name, a negative window, or a window of another policy.
    """
    if name not in POLICIES:
        raise ValueError(f"policy={name!r} is not known; the policies are {', '.join(POLICIES)}")
    if window is not None and (name != "sjf_aligned" or window < 0):
        raise ValueError(
            f"alignment_window={window} must be None, or at least 0 with policy='sjf_aligned' ({name!r} here)"
        )
    return Policy(name, _by_arrival if name == "fcfs" else _by_work_left, window)
