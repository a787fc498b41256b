"""What a merge method is: a pure function of weighted tensors, and what it wants to be given."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.merging.options import as_keywords, check_options, find_options

DROP_DOMAIN = "lorasb-dare-1"  # of the seeds that say which entries DARE drops


class Space(Enum):
    """Which tensors a method is given, and so what it makes.

    From the first three it makes cores again, and therefore an adapter; a method on deltas leaves
    the basis, and its result can only go into weights.
    """

    CORES = "cores"  # all cores as one flat vector [D], float64; needs no basis
    CORE = "core"  # one target's core [r, r], float64, in the basis' own coordinates
    ORTHONORMAL = "orthonormal"  # the same in coordinates that keep the deltas' lengths and angles
    DELTA = "delta"  # one target's delta [out, in], float32


@dataclass(frozen=True)
class Part:
    """One adapter's tensor for one target module ("" for all at once), and its weight.

    version: the adapter's. All parts of one call have the same shape and dtype.
    """

    tensor: torch.Tensor
    weight: float = 1.0
    module: str = ""
    version: str = ""

    @property
    def weighted(self) -> torch.Tensor:
        return self.weight * self.tensor

    def with_tensor(self, tensor: torch.Tensor) -> "Part":
        return dataclasses.replace(self, tensor=tensor)

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers that depend on seed, module and version alone."""
        text = f"{DROP_DOMAIN}\0{seed}\0{self.module}\0{self.version}"
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


# From the adapters' parts, read once and in order, to what they become; options are keywords.
Merge = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class MergeMethod:
    """A merge method as the plugin table has it, and with the options that were chosen.

    count: how many adapters it takes, where that is fixed. ordered: whether the order in which
    they are given matters; if not, they come in digest order, each version once.
    """

    name: str
    merge: Merge
    space: Space
    count: int | None = None
    ordered: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def takes(self, option: str) -> bool:
        return option in find_options(self.merge)

    def with_options(self, given: Mapping[str, Any]) -> "MergeMethod":
        """The method with these options and its defaults. Raises InputError as `check_options`."""
        return dataclasses.replace(self, options=check_options(self.name, self.merge, given))

    def check_count(self, found: int) -> None:
        """Raises InputError for another number of adapters than the method takes."""
        if not found:
            raise InputError("found no adapters, expected at least one")
        if self.count is not None and found != self.count:
            raise InputError(
                f"method {self.name}: found {found} adapters, expected exactly {self.count}"
            )

    def __call__(self, parts: Iterable[Part]) -> torch.Tensor:
        return self.merge(parts, **as_keywords(self.merge, self.options))
