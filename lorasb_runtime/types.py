"""Plain descriptions that every level shares. No torch, no I/O."""

from collections.abc import Callable
from dataclasses import dataclass

# Told of progress: the phase, units done, units in all, and a short note.
Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class TargetModule:
    """A linear layer that may carry a delta, by its Hugging Face checkpoint name.

    `transposed` says that the checkpoint stores the weight as [in, out] (GPT-2's Conv1D).
    """

    module: str
    rank: int
    in_features: int
    out_features: int
    transposed: bool = False


@dataclass(frozen=True)
class BaseModelId:
    """What a basis or an adapter says about its base model; a null fingerprint is unverified."""

    name: str
    revision: str | None = None
    fingerprint: str | None = None

    def as_json(self) -> dict[str, str | None]:
        return {"name": self.name, "revision": self.revision, "fingerprint": self.fingerprint}


def core_offsets(targets: tuple[TargetModule, ...]) -> tuple[int, ...]:
    """Where each target's core starts in the flat cores vector; one more entry gives D."""
    offsets = [0]
    for target in targets:
        offsets.append(offsets[-1] + target.rank * target.rank)
    return tuple(offsets)
