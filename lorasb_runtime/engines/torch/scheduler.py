"""Decides what runs in the next step. Pure Python: integers in, integers out, no tensor.

Decoding sequences go first, one token each; what is left of the step's token budget goes to
prefill chunks, those already begun before new ones. When the KV cache is full, the sequence that
came last gives its region back and is computed again later (preemption by recompute).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from lorasb_runtime.config import SchedulerConfig
from lorasb_runtime.engines.torch.kv_regions import KVRegions, Move, Region
from lorasb_runtime.engines.torch.sequence import Sequence

# Gives a sequence its adapter slot (or None while all are leased), and takes it back.
LeaseSlot = Callable[[Sequence], int | None]
ReleaseSlot = Callable[[Sequence], None]


@dataclass(frozen=True)
class Chunk:
    """`count` prompt tokens of a sequence, from position `start`; `last` ones give a token."""

    sequence: Sequence
    start: int
    count: int
    last: bool


@dataclass
class Step:
    """What one forward pass computes, and the copies in the KV cache that must come before it."""

    decodes: list[Sequence] = field(default_factory=list)
    prefills: list[Chunk] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.decodes) + sum(chunk.count for chunk in self.prefills)


class Scheduler:
    """Waiting and running sequences, first come first served."""

    def __init__(
        self,
        config: SchedulerConfig,
        regions: KVRegions,
        lease: LeaseSlot,
        release: ReleaseSlot,
    ) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._config = config
        self._regions = regions
        self._lease = lease
        self._release = release
        self._arrivals = 0
        self._moved_from: list[Region] = []

    def add(self, sequence: Sequence) -> None:
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever its state, and give back all that it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._give_back(sequence)

    def schedule(self) -> Step:
        """The next step; empty when nothing can run. Advances `computed` of all that is in it."""
        for region in self._moved_from:
            self._regions.free(region)
        self._moved_from.clear()
        step = Step()
        self._schedule_decodes(step)
        budget = max(0, self._config.max_batched_tokens - len(step.decodes))
        for sequence in self.running:
            if budget and sequence.remaining > 1 and sequence not in step.decodes:
                budget -= self._add_chunk(step, sequence, budget)
        self._admit(step, budget)
        for sequence in step.decodes:
            sequence.computed += 1
        for chunk in step.prefills:
            chunk.sequence.computed += chunk.count
        return step

    def _schedule_decodes(self, step: Step) -> None:
        for sequence in sorted(self.running, key=lambda s: s.arrival):
            if sequence.region is None or sequence.remaining != 1:
                continue
            while sequence.region is not None and not self._grow(step, sequence):
                self._preempt(step, max(self.running, key=lambda s: s.arrival))
            if sequence.region is not None:
                step.decodes.append(sequence)

    def _grow(self, step: Step, sequence: Sequence) -> bool:
        """Make room for the sequence's next token; False when the KV cache is full."""
        assert sequence.region is not None
        needed = len(sequence.tokens)
        if needed <= self._regions.capacity(sequence.region):
            return True
        larger = self._regions.allocate(needed)
        if larger is None:
            return False
        step.moves.append(Move(sequence.region, larger, sequence.computed))
        self._moved_from.append(sequence.region)
        sequence.region = larger
        return True

    def _preempt(self, step: Step, victim: Sequence) -> None:
        """Send a running sequence back to the head of the queue, to be computed again."""
        step.moves = [move for move in step.moves if move.target != victim.region]
        if victim in step.decodes:
            step.decodes.remove(victim)
        self.running.remove(victim)
        self._give_back(victim)
        victim.computed = 0
        self.waiting.appendleft(victim)

    def _admit(self, step: Step, budget: int) -> None:
        """Start waiting sequences while there is room; one without a free slot is passed over."""
        passed_over: list[Sequence] = []
        while budget and self.waiting and len(self.running) < self._config.max_num_seqs:
            sequence = self.waiting.popleft()
            slot = self._lease(sequence)
            if slot is None:
                passed_over.append(sequence)
                continue
            sequence.slot = slot
            sequence.region = self._regions.allocate(len(sequence.tokens))
            if sequence.region is None:
                self._give_back(sequence)
                self.waiting.appendleft(sequence)
                break
            self.running.append(sequence)
            budget -= self._add_chunk(step, sequence, budget)
        self.waiting.extendleft(reversed(passed_over))

    def _add_chunk(self, step: Step, sequence: Sequence, budget: int) -> int:
        count = min(sequence.remaining, budget)
        last = count == sequence.remaining
        step.prefills.append(Chunk(sequence, sequence.computed, count, last))
        return count

    def _give_back(self, sequence: Sequence) -> None:
        if sequence.region is not None:
            self._regions.free(sequence.region)
            sequence.region = None
        if sequence.slot is not None:
            self._release(sequence)
            sequence.slot = None
