"""Who owns which part of the KV cache, counted in integers; tensors are the KV cache's matter.

A sequence owns one contiguous region (a row of its size class), because on a CPU attention over
contiguous keys beats attention over gathered blocks. Classes double in capacity; a sequence that
outgrows its region moves to the next class.
"""

import heapq
from dataclasses import dataclass


@dataclass(frozen=True)
class Region:
    """Row `row` of size class `size`: room for the class' capacity in tokens."""

    size: int
    row: int


@dataclass(frozen=True)
class Move:
    """Copy the first `tokens` positions from one region to another before the step runs."""

    source: Region
    target: Region
    tokens: int


class KVRegions:
    """Hands out regions within a budget of tokens, summed over all rows of all classes.

    `rows[size]` says how many rows a class has now; the KV cache makes its tensors follow.
    """

    def __init__(self, budget: int, smallest: int, longest: int, max_rows: int) -> None:
        """`longest` is the context length; `budget` must hold at least one such region."""
        self.capacities: list[int] = []
        capacity = smallest
        while capacity < longest:
            self.capacities.append(capacity)
            capacity *= 2
        self.capacities.append(longest)
        assert budget >= longest
        self.budget = budget
        self.rows = [0] * len(self.capacities)
        self._max_rows = max_rows
        self._free: list[list[int]] = [[] for _ in self.capacities]

    @property
    def reserved(self) -> int:
        """Tokens for which there is room now, used or not."""
        return sum(n * c for n, c in zip(self.rows, self.capacities, strict=True))

    @property
    def used(self) -> int:
        """Tokens of room that sequences own."""
        owned = (n - len(f) for n, f in zip(self.rows, self._free, strict=True))
        return sum(n * c for n, c in zip(owned, self.capacities, strict=True))

    def capacity(self, region: Region) -> int:
        return self.capacities[region.size]

    def allocate(self, tokens: int) -> Region | None:
        """The smallest region with room for `tokens`, or None while the budget is used up."""
        fitting = [s for s, c in enumerate(self.capacities) if c >= tokens]
        if not fitting:
            return None
        if self._free[fitting[0]] or self._extend(fitting[0]):
            return self._pop(fitting[0])
        for size in fitting[1:]:
            if self._free[size]:
                return self._pop(size)
        return None

    def free(self, region: Region) -> None:
        assert region.row not in self._free[region.size]
        heapq.heappush(self._free[region.size], region.row)

    def _pop(self, size: int) -> Region:
        return Region(size, heapq.heappop(self._free[size]))

    def _extend(self, size: int) -> bool:
        """Give class `size` more rows (half as many again), from idle classes if need be."""
        capacity = self.capacities[size]
        spare = self.budget - self.reserved
        if spare < capacity:
            spare += self._release_idle(size)
        wanted = max(1, min(self.rows[size] // 2, self._max_rows - self.rows[size]))
        added = min(wanted, spare // capacity)
        for row in range(self.rows[size], self.rows[size] + added):
            heapq.heappush(self._free[size], row)
        self.rows[size] += added
        return added > 0

    def _release_idle(self, keep: int) -> int:
        """Drop the rows of classes that nobody uses; returns the tokens that this sets free."""
        released = 0
        for size, capacity in enumerate(self.capacities):
            if size != keep and self.rows[size] and len(self._free[size]) == self.rows[size]:
                released += self.rows[size] * capacity
                self.rows[size] = 0
                self._free[size] = []
        return released
