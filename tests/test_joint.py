"""The joint basis of many deltas: what it keeps, what it says it loses, and when it is exact."""

import pytest
import torch
from deltas import dense, families
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasb_runtime.basis.clusters import cluster
from lorasb_runtime.basis.joint_cores import JointModule, joint_module
from lorasb_runtime.basis.stack import LowRank, make_stack

# The error of a core, B and A that are exact but for their rounding to float32.
ROUNDED = 2e-7


def stored(module: JointModule, place: int) -> torch.Tensor:
    return module.b.double() @ module.cores[place].double() @ module.a.double()


def mean_loss(module: JointModule) -> float:
    return float((module.errors / module.norms).square().mean())


def strongest(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.eigh(matrix @ matrix.t()).eigenvectors[:, -rank:]


def plain_alternation(deltas: list[torch.Tensor], rank: int, sweeps: int = 25) -> float:
    """What the published algorithm keeps: the deltas whole, in float64, from a random start."""
    units = [delta / delta.norm() for delta in deltas]
    start = torch.randn(units[0].shape[1], rank, generator=torch.Generator().manual_seed(9))
    v = torch.linalg.qr(start.double()).Q
    for _ in range(sweeps):
        u = strongest(torch.cat([unit @ v for unit in units], dim=1), rank)
        v = strongest(torch.cat([unit.t() @ u for unit in units], dim=1), rank)
    return float(torch.stack([(u.t() @ unit @ v).square().sum() for unit in units]).mean())


@pytest.mark.parametrize("rank", [4, 12, 40])
def test_errors_are_those_of_the_full_matrices(rank: int) -> None:
    deltas: list[LowRank | None] = [*families(9, (40, 56), 3, kinds=2, noise=0.5)]
    deltas += families(4, (40, 56), 6, noise=0.5, seed=1)
    b, a = torch.randn(40, 1), torch.randn(1, 56)
    cancelled = LowRank(torch.cat([b, -b], dim=1), torch.cat([a, a]))
    deltas += [None, LowRank(torch.zeros(40, 2), torch.randn(2, 56)), cancelled]
    deltas.append(LowRank(torch.randn(40, 1).bfloat16(), torch.randn(1, 56).half(), -0.3))
    module = joint_module(make_stack(deltas), rank)
    assert module.b.shape == (40, rank) and module.a.shape == (rank, 56)
    for place, delta in enumerate(deltas):
        wanted = torch.zeros(40, 56).double() if delta is None else dense(delta)
        error = (wanted - stored(module, place)).norm()
        assert abs(module.norms[place] - wanted.norm()) <= 1e-13 * wanted.norm()
        assert abs(module.errors[place] - error) <= 1e-13 * wanted.norm() + 1e-12 * error
    assert (module.b.t() @ module.b - torch.eye(rank)).abs().max() < 1e-6
    assert (module.a @ module.a.t() - torch.eye(rank)).abs().max() < 1e-6


def test_it_is_exact_where_the_rank_holds_the_sum_of_the_ranks() -> None:
    deltas = families(6, (90, 300), 8, width=60, noise=1.0)
    module = joint_module(make_stack(deltas), 64)
    assert module.b.shape[1] == 48  # no wider than needed
    assert (module.errors <= ROUNDED * module.norms).all()


def test_it_is_exact_where_the_spans_fit_whatever_the_sum_of_the_ranks() -> None:
    deltas = families(200, (90, 300), 8, kinds=2, width=12)
    module = joint_module(make_stack(deltas), 30)
    assert module.b.shape[1] == 24
    assert (module.errors <= ROUNDED * module.norms).all()
    one_side = [LowRank(deltas[0].b, delta.a) for delta in families(4, (90, 300), 8, width=60)]
    module = joint_module(make_stack(one_side), 40)
    assert module.b.shape == (90, 32)  # B is filled up to the width of A
    assert (module.errors <= ROUNDED * module.norms).all()


def test_one_delta_is_cut_as_its_singular_values_say() -> None:
    delta = families(1, (80, 50), 20, width=40)[0]
    module = joint_module(make_stack([delta]), 6)
    tail = torch.linalg.svdvals(dense(delta))[6:].norm()
    assert float(module.errors[0]) == pytest.approx(float(tail), rel=1e-5)


@pytest.mark.parametrize("noise", [0.2, 1.0])
@pytest.mark.parametrize("shape", [(60, 70), (220, 260)])  # whole, and by way of a sketch
def test_it_keeps_as_much_as_the_published_algorithm(shape: tuple[int, int], noise: float) -> None:
    deltas = families(24, shape, 4, kinds=3, width=8, noise=noise)
    module = joint_module(make_stack(deltas), 20)
    kept = 1 - mean_loss(module)
    assert kept >= 0.998 * plain_alternation([dense(delta) for delta in deltas], 20)
    assert float(module.spectrum.square().sum()) == pytest.approx(kept, rel=1e-4)
    assert (module.spectrum.diff() <= 0).all()


def test_a_loud_delta_does_not_own_the_basis() -> None:
    deltas = families(10, (48, 40), 4, noise=0.4)
    even = joint_module(make_stack(deltas), 8)
    loud = [LowRank(d.b, d.a, d.scaling * (1e6 if i == 0 else 1)) for i, d in enumerate(deltas)]
    module = joint_module(make_stack(loud), 8)
    assert torch.equal(even.b, module.b) and torch.equal(even.a, module.a)
    assert torch.allclose(module.errors / module.norms, even.errors / even.norms, rtol=1e-12)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_extreme_numbers_neither_overflow_nor_vanish(size: float) -> None:
    deltas = families(8, (30, 40), 4, noise=0.3)
    scaled = [LowRank(d.b * size, d.a / size, d.scaling) for d in deltas]
    loss = mean_loss(joint_module(make_stack(deltas), 8))
    assert mean_loss(joint_module(make_stack(scaled), 8)) == pytest.approx(loss, rel=1e-4)


def test_two_runs_agree_bit_for_bit_and_the_global_generator_is_left_alone() -> None:
    stack = make_stack(families(30, (200, 210), 4, kinds=2, noise=0.5))
    state = torch.random.get_rng_state()
    first, second = joint_module(stack, 8, seed=3), joint_module(stack, 8, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("b", "a", "cores", "errors", "spectrum"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 6),
    out_features=st.integers(1, 20),
    in_features=st.integers(1, 20),
    rank=st.integers(1, 24),
    seed=st.integers(0, 10**6),
)
def test_any_shape_and_rank_is_no_worse_than_its_best_and_says_so(
    count: int, out_features: int, in_features: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = []
    for index in range(count):
        k = 1 + (seed + index) % 5  # also above what the shape allows
        b = torch.randn(out_features, k, generator=generator)
        deltas.append(LowRank(b, torch.randn(k, in_features, generator=generator)))
    module = joint_module(make_stack(deltas), rank)
    for place, delta in enumerate(deltas):
        wanted = dense(delta)
        lost = torch.linalg.svdvals(wanted)[module.b.shape[1] :].norm()
        assert module.errors[place] >= lost - 1e-6 * wanted.norm()
        error = (wanted - stored(module, place)).norm()
        assert abs(module.errors[place] - error) <= 1e-12 * wanted.norm()
    if sum(delta.b.shape[1] for delta in deltas) <= module.b.shape[1]:
        assert (module.errors <= ROUNDED * module.norms).all()


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_the_families(seed: int) -> None:
    stacks = [
        make_stack(families(40, (64, 80), 6, kinds=5, width=8, noise=0.3, seed=module))
        for module in range(3)
    ]
    found = cluster(stacks, 5, 8, seed)
    assert found.tolist() == [place % 5 for place in range(40)]
    assert torch.equal(found, cluster(stacks, 5, 8, seed))


def test_no_cluster_is_empty_and_missing_deltas_are_no_obstacle() -> None:
    deltas: list[LowRank | None] = [*families(6, (20, 24), 2, kinds=2, width=4)]
    deltas[0] = None
    found = cluster([make_stack(deltas), make_stack(deltas[::-1])], 4, 2)
    assert found.shape == (6,) and set(found.tolist()) == {0, 1, 2, 3}
    assert found[0] == 0  # numbered by the first member
