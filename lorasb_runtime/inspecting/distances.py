"""Distances between adapters, and the map in two dimensions that shows them best."""

from collections.abc import Sequence

import torch

from lorasb_runtime.inspecting.weight_space import WeightSpace

COLUMNS = 4096  # of the cores that are widened to float64 at once


def gram_matrix(adapters: Sequence[torch.Tensor], space: WeightSpace | None) -> torch.Tensor:
    """Inner products [n, n] in float64: of deltas with `space`, else of the cores [D] themselves.

    Taken module by module, so that nothing wider than the cores is held at once.
    """
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    if space is None:
        for start in range(0, adapters[0].numel(), COLUMNS):
            part = torch.stack([cores[start : start + COLUMNS].double() for cores in adapters])
            total += part @ part.t()
        return total
    for index in range(len(space.basis.targets)):
        part = torch.stack([space.core(cores, index).flatten() for cores in adapters])
        total += part @ part.t()
    return total


def distance_matrix(gram: torch.Tensor) -> torch.Tensor:
    """Distances [n, n] from inner products, zero on the diagonal.

    Those under about 1e-8 of the adapters' norms are lost in float64's rounding.
    """
    squares = gram.diagonal()
    distances = (squares[:, None] + squares - 2 * gram).clamp_min(0.0).sqrt()
    return distances.fill_diagonal_(0.0)


def classical_map(gram: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Classical multidimensional scaling: places [n, 2], and the share of the squared distances
    that they keep.

    Torgerson 1952: the two strongest directions of the centred inner products.
    """
    centred = gram - gram.mean(dim=0) - gram.mean(dim=1, keepdim=True) + gram.mean()
    values, vectors = torch.linalg.eigh(centred)
    values = values.clamp_min(0.0).flip(0)
    places = torch.zeros(len(gram), 2, dtype=gram.dtype)
    shown = min(2, len(gram))
    places[:, :shown] = vectors.flip(1)[:, :shown] * values[:shown].sqrt()
    total = values.sum()
    return places, float(values[:2].sum() / total) if total > 0 else 1.0


def in_neighbour_order(distances: torch.Tensor) -> list[int]:
    """Places in an order in which near ones are neighbours: from one end, always to the nearest."""
    left = set(range(len(distances)))
    at = int(distances.sum(dim=0).argmax())
    order = []
    while left:
        order.append(at)
        left.discard(at)
        at = min(left, key=lambda other: (float(distances[at, other]), other), default=at)
    return order
