"""Which of vLLM's layers carries which of the basis' targets. Pure Python.

vLLM fuses q, k, v and gate, up into one layer each; a checkpoint may hold them fused as well.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lorasb_runtime.errors import BasisMismatchError
from lorasb_runtime.types import TargetModule


@dataclass(frozen=True)
class Group:
    """Neighbouring members of one vLLM layer that have one rank: they are multiplied together.

    members: places in the layer's list of fused modules. targets: places in the basis' targets.
    """

    layer: str
    members: tuple[int, ...]
    targets: tuple[int, ...]
    rank: int


def place_targets(
    targets: Sequence[TargetModule],
    layers: Sequence[str],
    packed: Mapping[str, Sequence[str]],
    elsewhere: Callable[[str], bool],
    rename: Callable[[str], str] = lambda name: name,
) -> list[Group]:
    """The groups of all targets that are on this rank, in the order of the basis.

    layers: names of this rank's linear layers. packed: a layer's own name to those of what is
    fused in it. elsewhere: whether a module is on another rank (pipeline parallelism). rename:
    from a checkpoint's module name to vLLM's. Raises BasisMismatchError for a target that vLLM has
    no linear layer for.
    """
    homes = {}
    for layer in layers:
        parent, _, own = layer.rpartition(".")
        for member, name in enumerate(packed.get(own, [own])):
            homes[f"{parent}.{name}" if parent else name] = (layer, member)
    found: dict[str, list[tuple[int, int]]] = {}
    for index, target in enumerate(targets):
        name = rename(target.module)
        if name in homes:
            layer, member = homes[name]
            found.setdefault(layer, []).append((member, index))
        elif not elsewhere(name):
            raise BasisMismatchError(
                f"{target.module}: found no linear layer of that name in vLLM's model, expected "
                "one; embeddings, output heads and mixtures' experts cannot carry a core there"
            )
    groups = []
    for layer, members in found.items():
        runs: list[list[tuple[int, int]]] = []
        for member, index in sorted(members):
            if runs and targets[runs[-1][-1][1]].rank == targets[index].rank:
                runs[-1].append((member, index))
            else:
                runs.append([(member, index)])
        for run in runs:
            indices = tuple(index for _, index in run)
            fused = tuple(member for member, _ in run)
            groups.append(Group(layer, fused, indices, targets[indices[0]].rank))
    return groups
