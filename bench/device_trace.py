"""What a GPU did: its kernels and copies in their order, cut into steps, and the operator that each belongs to.

Cuts are marks, empty kernels that stand in the trace like any other. A trace is then read by names and order alone,
which a replayed CUDA graph has as well, though its launches have no Python and no range around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
import triton
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

OUTSIDE = "outside the operators"
UNKNOWN = "not attributed"
GAPS = "gaps"


@dataclass(frozen=True, order=True)
class Event:
    """A kernel, a copy or a fill on the GPU; seconds from any one moment."""

    start: float
    end: float
    name: str


@triton.jit
def _profile_mark_kernel(x_ptr):
    pass


MARK = _profile_mark_kernel.__name__


class Marks:
    """Puts marks between kernels, each with a label for what follows it. As an Observer: a mark around each call."""

    def __init__(self, device: torch.device):
        self.labels: list[str] = []
        self._x = torch.empty(1, device=device)
        _profile_mark_kernel[(1,)](self._x)  # compiled before anything is traced

    def put(self, label: str) -> None:
        _profile_mark_kernel[(1,)](self._x)
        self.labels.append(label)

    def begins(self, op: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self.put(op)

    def ends(self, op: str) -> None:
        self.put(OUTSIDE)


def trace(run: Callable[[], Any]) -> list[Event]:
    """What the GPU does for `run`, by start. Python's operators are not traced: that would slow the host."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    times = [(e.time_range, e.name) for e in profiler.events() if e.device_type == DeviceType.CUDA]
    return sorted(Event(span.start * 1e-6, span.end * 1e-6, name) for span, name in times)


@dataclass(frozen=True)
class Section:
    """What started from one mark up to the next, which is at `end`."""

    start: float
    end: float
    events: list[Event]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(event.name for event in self.events)

    def own_times(self) -> list[float]:
        """The seconds of each event that no earlier one takes: a kernel that is launched before the one before it ends
        counts from that end. With the gaps between them they are the section's length.
        """
        reached, times = self.start, []
        for event in self.events:
            end = min(event.end, self.end)
            times.append(max(0.0, end - max(event.start, reached)))
            reached = max(reached, end)
        return times


def sections(events: Iterable[Event], marks: int) -> list[Section]:
    """One for each mark, by the order of their starts; what comes before the first is in none.

    The last ends with its last event. RuntimeError where the trace does not have so many marks.
    """
    begun: list[tuple[float, list[Event]]] = []
    for event in sorted(events):
        if MARK in event.name:  # a compiler may add to the name
            begun.append((event.start, []))
        elif begun:
            begun[-1][1].append(event)
    if len(begun) != marks:
        raise RuntimeError(f"the trace of the GPU has {len(begun)} of the {marks} marks put into it")
    ends = [start for start, _ in begun[1:]] + [max((e.end for e in begun[-1][1]), default=begun[-1][0])]
    return [Section(start, end, inside) for (start, inside), end in zip(begun, ends, strict=True)]


def labelled(events: Iterable[Event], labels: Sequence[str]) -> list[tuple[str, str]]:
    """(name, label) of each kernel of a trace whose marks had these labels, in order."""
    cut = sections(events, len(labels))
    return [(name, text) for section, text in zip(cut, labels, strict=True) for name in section.names]


class Attribution:
    """The operator of each kernel of a step, by what an eager step with marks around its operators has shown.

    A step that really runs may differ from it: a graph is captured for a larger batch, for which a library takes
    another kernel, and has kernels that keep its books. So its names are aligned with those known, and then a kernel
    belongs, by the first rule that holds, to
      1. the label of the known kernel that stands in its place under the same name;
      2. the label that all known kernels of its name have;
      3. the one label of the known kernels whose place it and its neighbours have taken;
    else its label is UNKNOWN.

    known: (name, label) of each kernel of the eager step, in order
    """

    def __init__(self, known: Sequence[tuple[str, str]]):
        self.known = list(known)
        self._labels: dict[str, set[str]] = {}
        for name, text in known:
            self._labels.setdefault(name, set()).add(text)
        self._found: dict[tuple[str, ...], list[str]] = {}

    def __call__(self, names: Sequence[str]) -> list[str]:
        """A label for each."""
        names = tuple(names)
        if names not in self._found:  # steps are alike
            self._found[names] = self._attribute(names)
        return self._found[names]

    def _attribute(self, names: tuple[str, ...]) -> list[str]:
        found = []
        matcher = SequenceMatcher(None, [name for name, _ in self.known], names, autojunk=False)
        for what, i, end, j, names_end in matcher.get_opcodes():
            labels = [text for _, text in self.known[i:end]]
            if what != "equal":
                of_place = _only(set(labels))
                labels = [_only(self._labels.get(name, ())) or of_place or UNKNOWN for name in names[j:names_end]]
            found += labels
        return found


def _only(labels: Iterable[str]) -> str | None:
    labels = list(labels)
    return labels[0] if len(labels) == 1 else None


def step_parts(section: Section, attribution: Attribution) -> dict[tuple[str, str], float]:
    """The seconds of a step by (label, kernel name), the gaps last; they add up to the step. Its mark is a gap."""
    parts: dict[tuple[str, str], float] = {}
    times = section.own_times()
    for name, text, seconds in zip(section.names, attribution(section.names), times, strict=True):
        parts[text, name] = parts.get((text, name), 0.0) + seconds
    return parts | {(GAPS, ""): section.end - section.start - sum(times)}
