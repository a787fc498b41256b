"""Decides what runs in the next step. Pure Python: integers in, integers out, no tensor.

Decoding sequences go first, one token each; what is left of the step's token budget goes to
prompts, the shortest first but a quarter to the oldest, so that no long prompt holds up others, or
is held up for ever. Waiting sequences come in owner by owner. When the KV cache is full, the one
that came last gives its region back and is computed again later (preemption by recompute).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from lorasb_runtime.config import SchedulerConfig
from lorasb_runtime.engines.torch.fair_queue import FairQueue
from lorasb_runtime.engines.torch.kv_regions import KVRegions, Move, Region
from lorasb_runtime.engines.torch.prefix_cache import BlockCopy, PrefixCache
from lorasb_runtime.engines.torch.sequence import Sequence

# No prompt is begun whose share of a step would be fewer tokens than this.
SMALLEST_SHARE = 16

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
    """What one forward pass computes, and the KV copies that come before it, in this order:
    `saves` into the prefix cache, `moves` between regions, `restores` from the prefix cache.
    """

    decodes: list[Sequence] = field(default_factory=list)
    prefills: list[Chunk] = field(default_factory=list)
    saves: list[BlockCopy] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    restores: list[BlockCopy] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.decodes) + sum(chunk.count for chunk in self.prefills)


class Scheduler:
    """Waiting and running sequences; `prefixes` None computes every prompt anew."""

    def __init__(
        self,
        config: SchedulerConfig,
        regions: KVRegions,
        lease: LeaseSlot,
        release: ReleaseSlot,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._config = config
        self._regions = regions
        self._lease = lease
        self._release = release
        self._prefixes = prefixes
        self._arrivals = 0
        self._moved_from: list[Region] = []
        self._saves: list[BlockCopy] = []

    def add(self, sequence: Sequence) -> None:
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self.waiting.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever its state, and give back all that it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._keep(sequence)
        else:
            self.waiting.remove(sequence)
        self._give_back(sequence)

    def forget(self) -> None:
        """Empty the prefix cache: a step has failed, and what it should have saved is not there."""
        self._saves.clear()
        if self._prefixes is not None:
            self._prefixes.clear()

    def schedule(self) -> Step:
        """The next step; empty when nothing can run. Advances `computed` of all that is in it."""
        for region in self._moved_from:
            self._regions.free(region)
        self._moved_from.clear()
        for sequence in self.running:
            if not sequence.kept and sequence.computed >= sequence.prompt_length:
                sequence.kept = True
                self._keep(sequence)
        step = Step()
        self._schedule_decodes(step)
        self._admit(step)
        self._share_budget(step)
        for sequence in step.decodes:
            sequence.computed += 1
        for chunk in step.prefills:
            chunk.sequence.computed += chunk.count
        if step.tokens:
            step.saves, self._saves = self._saves, []
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
        self.preemptions += 1
        self._give_back(victim)
        victim.computed = 0
        self.waiting.put_back(victim)

    def _admit(self, step: Step) -> None:
        """Start waiting sequences while there is room for them and budget for their first tokens.

        One without a free slot is passed over, and so is one whose next block is being computed
        for another sequence right now: it will find that block in the prefix cache.
        """
        if not self.waiting:
            return
        prefilling = [s for s in self.running if s.remaining > 1]
        budget = self._config.max_batched_tokens - len(step.decodes)
        computing = {digest for s in prefilling for digest in self._shared(s)}
        passed_over: list[Sequence] = []
        while (
            self.waiting
            and len(self.running) < self._config.max_num_seqs
            and len(prefilling) * SMALLEST_SHARE < budget
            and len(passed_over) < self._config.max_num_seqs
        ):
            sequence = self.waiting.pop()
            chain = self._shared(sequence)
            ids = self._prefixes.match(chain) if self._prefixes else ()
            missing = chain[len(ids) : len(ids) + 1]
            if not computing.isdisjoint(missing) or not self._take_slot(sequence):
                passed_over.append(sequence)
                continue
            sequence.region = self._regions.allocate(len(sequence.tokens))
            if sequence.region is None:
                self._give_back(sequence)
                self.waiting.put_back(sequence)
                break
            if ids and self._prefixes:
                step.restores.append(BlockCopy(sequence.region, 0, ids))
                sequence.computed = len(ids) * self._prefixes.block
            if sequence.cached is None:
                sequence.cached = sequence.computed
            computing.update(chain)
            self.running.append(sequence)
            prefilling.append(sequence)
        for sequence in reversed(passed_over):
            self.waiting.put_back(sequence)

    def _share_budget(self, step: Step) -> None:
        """Cut chunks: a quarter for whoever has waited longest, the rest to the shortest first."""
        budget = max(0, self._config.max_batched_tokens - len(step.decodes))
        decoding = set(step.decodes)
        prefilling = [s for s in self.running if s not in decoding]
        if not prefilling:
            return
        oldest = min(prefilling, key=lambda s: s.arrival)
        reserved = min(oldest.remaining, -(-budget // 4))
        budget -= reserved
        for sequence in sorted(prefilling, key=lambda s: (s.remaining, s.arrival)):
            own = reserved if sequence is oldest else 0
            count = min(sequence.remaining, own + budget)
            budget -= count - own
            if count:
                last = count == sequence.remaining
                step.prefills.append(Chunk(sequence, sequence.computed, count, last))

    def _take_slot(self, sequence: Sequence) -> bool:
        sequence.slot = self._lease(sequence)
        return sequence.slot is not None

    def _shared(self, sequence: Sequence) -> list[bytes]:
        """Digests of the blocks that the sequence may take from the prefix cache."""
        if self._prefixes is None or sequence.sampling.prompt_logprobs is not None:
            return []
        return self._prefixes.wanted(sequence)

    def _keep(self, sequence: Sequence) -> None:
        """Plan to save the sequence's computed blocks in the prefix cache, before its next step."""
        if self._prefixes is not None and sequence.region is not None:
            saved = self._prefixes.keep(sequence)
            if saved is not None:
                self._saves.append(saved)

    def _give_back(self, sequence: Sequence) -> None:
        if sequence.region is not None:
            self._regions.free(sequence.region)
            sequence.region = None
        if sequence.slot is not None:
            self._release(sequence)
            sequence.slot = None
