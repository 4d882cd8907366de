"""The requests that wait for admission, in two orders at once."""

from __future__ import annotations

import heapq

from .policy import Policy
from .sequence import Sequence


class WaitingQueue:
    """First by the policy's order and first by arrival, each in O(log n)."""

    def __init__(self, policy: Policy):
        self._order = policy.order
        self._by_policy: list[tuple] = []
        self._by_arrival: list[tuple] = []
        self._entries: dict[int, list] = {}  # sequence id to its entry, [sequence], in both heaps

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, seq: Sequence) -> None:
        entry = self._entries[seq.id] = [seq]
        heapq.heappush(self._by_policy, (self._order(seq), entry))
        heapq.heappush(self._by_arrival, (seq.id, entry))

    def remove(self, seq: Sequence) -> None:
        """Empties its entry, which the heaps drop when it comes to their top."""
        self._entries.pop(seq.id).clear()

    def best(self) -> Sequence | None:
        return self._top(self._by_policy)

    def oldest(self) -> Sequence | None:
        return self._top(self._by_arrival)

    def first(self, count: int) -> list[Sequence]:
        """At most so many, by arrival; in O(n)."""
        return [self._entries[seq_id][0] for seq_id in heapq.nsmallest(count, self._entries)]

    @staticmethod
    def _top(heap: list[tuple]) -> Sequence | None:
        while heap:
            entry = heap[0][-1]
            if entry:
                return entry[0]
            heapq.heappop(heap)
        return None
