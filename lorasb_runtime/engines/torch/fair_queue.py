"""The waiting sequences: first come first served for each user, users in turn. Pure Python."""

from collections import OrderedDict, deque
from collections.abc import Iterator

from lorasb_runtime.engines.torch.sequence import Sequence


class FairQueue:
    """One line for each owner; `pop` takes from the lines in turn, so that none holds up another.

    An owner is a tenant's adapter version (`Sequence.owner`).
    """

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Sequence]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines.values():
            yield from line

    def add(self, sequence: Sequence) -> None:
        self._lines.setdefault(sequence.owner, deque()).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """To the head of its own line, and that line to the head of all: it has had its turn."""
        self._lines.setdefault(sequence.owner, deque()).appendleft(sequence)
        self._lines.move_to_end(sequence.owner, last=False)

    def pop(self) -> Sequence:
        owner, line = self._lines.popitem(last=False)
        sequence = line.popleft()
        if line:
            self._lines[owner] = line
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, if it is here."""
        line = self._lines.get(sequence.owner)
        if line is not None and sequence in line:
            line.remove(sequence)
            if not line:
                del self._lines[sequence.owner]
