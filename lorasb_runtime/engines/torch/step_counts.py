"""What the engine's steps were: how many, how long, of how many sequences. Pure Python."""

from bisect import bisect_left
from itertools import accumulate

from lorasb_runtime.engines.base import BATCH_SIZES


class StepCounts:
    """Counts since the start; written by one thread, read by any."""

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = 0.0
        self.forward_seconds = 0.0
        self.sequences = 0
        self._sizes = [0] * (len(BATCH_SIZES) + 1)

    def add(self, sequences: int, seconds: float, forward_seconds: float) -> None:
        """Count one step of so many sequences, and the seconds that it and its forward took."""
        self.steps += 1
        self.seconds += seconds
        self.forward_seconds += forward_seconds
        self.sequences += sequences
        self._sizes[bisect_left(BATCH_SIZES, sequences)] += 1

    @property
    def batch_counts(self) -> tuple[int, ...]:
        """As EngineStats has them: steps of at most BATCH_SIZES[i] sequences, then all steps."""
        return tuple(accumulate(self._sizes))
