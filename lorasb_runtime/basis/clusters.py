"""Which deltas should share a joint basis: k-means with what a basis loses as the distance.

A model has many modules and an adapter one basis for all of them, so a handful of modules is
looked at and each delta's loss is its mean over these.
"""

from collections.abc import Callable, Sequence

import torch

from lorasb_runtime.basis.joint import Pair, captured, joint_subspaces
from lorasb_runtime.basis.stack import Stack

ROUNDS = 20
CANDIDATES = 12  # for each further centre; the one that leaves the least loss is taken


def cluster(
    stacks: Sequence[Stack],
    clusters: int,
    rank: int,
    seed: int = 0,
    report: Callable[[int, int, float], None] = lambda *_: None,
) -> torch.Tensor:
    """A cluster for each place of the stacks (one stack a module, all of one count), int64 [count].

    Clusters are numbered from 0 by their first member; none is empty as long as `count` allows.
    `report` takes the round, how many there are at most, and the mean squared relative loss.
    """
    generator = torch.Generator().manual_seed(seed)
    present = _present(stacks)
    losses = _first_losses(stacks, present, clusters, generator)
    assigned = losses.argmin(dim=0)
    best, kept = float("inf"), assigned
    for done in range(1, ROUNDS + 1):
        _fill_empty(assigned, losses, clusters)
        losses = _losses_of(stacks, present, assigned, clusters, rank, seed)
        loss = float(losses.gather(0, assigned[None]).mean())
        if loss < best:
            best, kept = loss, assigned.clone()
        report(done, ROUNDS, best)
        before, assigned = assigned, losses.argmin(dim=0)
        if torch.equal(assigned, before):
            report(done, done, best)
            break
    return _by_first_member(kept)


def _present(stacks: Sequence[Stack]) -> torch.Tensor:
    """In how many of the stacks each place has a delta, [count], 1 at least."""
    total = torch.zeros(stacks[0].count)
    for stack in stacks:
        for batch in stack.batches:
            total[batch.places] += 1
    return total.clamp_min(1.0)


def _first_losses(
    stacks: Sequence[Stack], present: torch.Tensor, clusters: int, generator: torch.Generator
) -> torch.Tensor:
    """[clusters, count]: losses on the spans of single deltas, chosen far from one another.

    The greedy k-means++ of Arthur and Vassilvitskii, with the loss as the squared distance.
    """
    chances = torch.ones(stacks[0].count)
    chosen: list[torch.Tensor] = []
    for _ in range(clusters):
        drawn = torch.multinomial(chances, CANDIDATES, replacement=True, generator=generator)
        candidates = [_own_losses(stacks, present, place) for place in drawn.unique().tolist()]
        nearest = torch.stack(chosen).amin(dim=0) if chosen else torch.ones_like(chances)
        sums = [float(torch.minimum(nearest, c).sum()) for c in candidates]
        chosen.append(candidates[sums.index(min(sums))])
        chances = torch.stack(chosen).amin(dim=0).clamp_min(1e-12)
    return torch.stack(chosen)


def _own_losses(stacks: Sequence[Stack], present: torch.Tensor, place: int) -> torch.Tensor:
    """What every delta loses on the columns' and rows' spans of the one at `place`, [count]."""
    mask = torch.zeros(stacks[0].count, dtype=torch.bool)
    mask[place] = True
    pairs: list[Pair | None] = []
    for stack in stacks:
        own = stack.chosen(mask).batches
        if not own:
            pairs.append(None)
            continue
        sides = (own[0].left[0], own[0].right[0])
        pairs.append((torch.linalg.qr(sides[0].t()).Q, torch.linalg.qr(sides[1].t()).Q))
    return _losses(stacks, present, pairs)


def _losses_of(
    stacks: Sequence[Stack],
    present: torch.Tensor,
    assigned: torch.Tensor,
    clusters: int,
    rank: int,
    seed: int,
) -> torch.Tensor:
    """What every delta loses on each cluster's joint basis, [clusters, count]."""
    rows = []
    for index in range(clusters):
        members = [stack.chosen(assigned == index) for stack in stacks]
        pairs = [_joint(member, rank, seed) for member in members]
        rows.append(_losses(stacks, present, pairs))
    return torch.stack(rows)


def _joint(members: Stack, rank: int, seed: int) -> Pair | None:
    return joint_subspaces(members, rank, seed) if members.batches else None


def _losses(
    stacks: Sequence[Stack], present: torch.Tensor, pairs: Sequence[Pair | None]
) -> torch.Tensor:
    """The mean over a delta's modules of its squared relative loss, [count]; 0 without modules."""
    total = torch.zeros(stacks[0].count)
    for stack, pair in zip(stacks, pairs, strict=True):
        for piece in stack.pieces():
            lost = torch.ones(len(piece.places))
            if pair is not None:
                kept = captured(piece, pair[0].float(), pair[1].float()).square().sum(dim=(1, 2))
                lost = (1 - kept * piece.weights.float()).clamp_min(0.0)
            total[piece.places] += lost
    return total / present


def _fill_empty(assigned: torch.Tensor, losses: torch.Tensor, clusters: int) -> None:
    """Give each empty cluster, in place, the delta that loses most where others remain."""
    for index in range(clusters):
        if bool((assigned == index).any()):
            continue
        own = losses.gather(0, assigned[None])[0].clone()
        sizes = torch.bincount(assigned, minlength=clusters)
        own[sizes[assigned] < 2] = -1.0
        worst = int(own.argmax())
        if own[worst] >= 0:
            assigned[worst] = index


def _by_first_member(assigned: torch.Tensor) -> torch.Tensor:
    order = list(dict.fromkeys(assigned.tolist()))
    return torch.tensor([order.index(value) for value in assigned.tolist()])
