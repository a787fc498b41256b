"""Which KV blocks of past sequences are kept, and who may use them. Pure Python: no tensor.

A block is named by a digest of its tokens and of all before them, in a chain that starts from the
tenant and the adapter version, so that nothing is ever shared across either.
"""

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass

from lorasb_runtime.engines.torch.kv_regions import Region
from lorasb_runtime.engines.torch.sequence import Sequence

Digest = bytes


@dataclass(frozen=True)
class BlockCopy:
    """Copy positions start.. of a region, whole blocks, to or from the kept blocks `ids`."""

    region: Region
    start: int
    ids: tuple[int, ...]


class PrefixCache:
    """Names, finds and evicts kept blocks; `capacity` of them, of `block` tokens each.

    The least recently used goes first, the end of a chain before its beginning.
    """

    def __init__(self, capacity: int, block: int) -> None:
        self.block = block
        self._free = list(range(capacity - 1, -1, -1))
        self._kept: OrderedDict[Digest, int] = OrderedDict()

    @property
    def used(self) -> int:
        """Blocks that are kept."""
        return len(self._kept)

    def digests(self, sequence: Sequence) -> list[Digest]:
        """One for each whole block of the sequence's tokens so far."""
        chain = sequence.digests
        while (len(chain) + 1) * self.block <= len(sequence.tokens):
            begin = len(chain) * self.block
            before = chain[-1] if chain else hashlib.sha256(sequence.owner.encode()).digest()
            tokens = array("q", sequence.tokens[begin : begin + self.block])
            chain.append(hashlib.sha256(before + tokens.tobytes()).digest())
        return chain

    def wanted(self, sequence: Sequence) -> list[Digest]:
        """The blocks that would spare the sequence work; its last token is always computed."""
        return self.digests(sequence)[: (len(sequence.tokens) - 1) // self.block]

    def match(self, chain: list[Digest]) -> tuple[int, ...]:
        """The kept blocks that the chain begins with."""
        ids: list[int] = []
        for digest in chain:
            if digest not in self._kept:
                break
            ids.append(self._kept[digest])
        self._touch(chain[: len(ids)])
        return tuple(ids)

    def clear(self) -> None:
        self._free += self._kept.values()
        self._kept.clear()

    def keep(self, sequence: Sequence) -> BlockCopy | None:
        """Room for the computed blocks of a sequence that are not kept yet, and what to copy."""
        assert sequence.region is not None
        whole = self.digests(sequence)[: sequence.computed // self.block]
        first = 0
        while first < len(whole) and whole[first] in self._kept:
            first += 1
        self._touch(whole[:first])
        ids: list[int] = []
        for digest in whole[first:]:
            if digest in self._kept:  # what came before it was evicted, and is kept again now
                break
            block = self._room(whole)
            if block is None:
                break
            self._kept[digest] = block
            ids.append(block)
        self._touch(whole[: first + len(ids)])
        return BlockCopy(sequence.region, first * self.block, tuple(ids)) if ids else None

    def _room(self, protected: list[Digest]) -> int | None:
        if self._free:
            return self._free.pop()
        if not self._kept:
            return None
        oldest = next(iter(self._kept))
        return None if oldest in protected else self._kept.pop(oldest)

    def _touch(self, chain: list[Digest]) -> None:
        for digest in reversed(chain):
            self._kept.move_to_end(digest)
