"""Merge methods against PEFT's functions and mergekit's, on what both define alike.

Where a definition differs, docs/merge-methods.md says how.
"""

from typing import Any

import pytest
import torch
from mergekit import sparsify
from mergekit.merge_methods import merge_tensors
from peft.utils import merge_utils

from lorasb_runtime.merging import Part, find_method
from lorasb_runtime.merging.sparsify import drop, trim

SHAPE = (10, 10)
WEIGHTS = ([1.0, 1.0, 1.0], [0.7, 0.2, 1.6])
DENSITIES = (0.1, 0.29, 0.5)  # int(0.29 * 100) is 28: counts are cut off alike
SIGNED = [0.7, -0.3, 1.6]


def deltas(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def parts(weights: list[float]) -> list[Part]:
    tensors = deltas(len(weights))
    return [Part(d, w, "m", f"v{i}") for i, (d, w) in enumerate(zip(tensors, weights, strict=True))]


def ours(name: str, weights: list[float], **options: Any) -> torch.Tensor:
    return find_method(name).with_options(options)(parts(weights))


def mergekit(name: str, weights: list[float], tensors: Any = None, **options: Any) -> torch.Tensor:
    """mergekit's result on models whose common base is all zeros."""
    models = [torch.zeros(SHAPE), *(tensors or deltas(len(weights)))]
    parameters = {"weight": weights, **options}
    return merge_tensors(models, name, parameters=parameters, base_index=0)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    assert expected.abs().max() > 0
    return torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", [*WEIGHTS, SIGNED])
def test_linear_is_mergekits(weights: list[float], normalize: bool) -> None:
    expected = merge_tensors(
        deltas(), "linear", parameters={"weight": weights, "normalize": normalize}
    )
    assert same(ours("linear", weights, normalize=normalize), expected)


@pytest.mark.parametrize("weights", [*WEIGHTS, SIGNED])
def test_task_arithmetic_is_mergekits_and_pefts(weights: list[float]) -> None:
    expected = mergekit("task_arithmetic", weights, **{"lambda": 0.4})
    assert same(ours("task-arithmetic", weights, **{"lambda": 0.4}), expected)
    peft = merge_utils.task_arithmetic(deltas(), torch.tensor(weights))
    assert same(ours("task-arithmetic", weights), peft)


@pytest.mark.parametrize("density", DENSITIES)
def test_trim_is_mergekits_and_pefts(density: float) -> None:
    for delta in deltas():
        found = trim(delta, density)
        assert torch.equal(found, merge_utils.magnitude_based_pruning(delta, density))
        assert torch.equal(found, sparsify.magnitude(delta, density))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_trimmed_sum_is_pefts_magnitude_prune(weights: list[float], density: float) -> None:
    """Trim and weights as ties takes them, with one adapter at a time: nothing to elect."""
    peft = merge_utils.magnitude_prune(deltas(), torch.tensor(weights), density)
    alone = [
        find_method("ties").with_options({"density": density})([part]) for part in parts(weights)
    ]
    assert same(torch.stack(alone).sum(0), peft)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_ties_of_equal_weights_is_pefts(weight: float, density: float) -> None:
    weights = [weight] * 5
    peft = merge_utils.ties(deltas(5), torch.tensor(weights), density)
    assert same(ours("ties", weights, density=density), peft)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_ties_by_frequency_is_pefts_for_weights_above_zero(
    weights: list[float], density: float
) -> None:
    peft = merge_utils.ties(deltas(), torch.tensor(weights), density, "frequency")
    assert same(ours("ties", weights, density=density, majority_sign="frequency"), peft)


@pytest.mark.parametrize("density", [*DENSITIES, 1.0])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_normalized_ties_is_mergekits(weights: list[float], density: float) -> None:
    expected = mergekit("ties", weights, density=density, **{"lambda": 0.8})
    options = {"density": density, "normalize": True, "lambda": 0.8}
    assert same(ours("ties", weights, **options), expected)


def dropped(item: Part, density: float, seed: int, rescale: bool = True) -> torch.Tensor:
    return drop(item.tensor, density, rescale, item.generator(seed))


@pytest.mark.parametrize("density", DENSITIES)
def test_drop_is_pefts_and_without_rescaling_mergekits(density: float) -> None:
    """Both draw from torch's own generator, which gets our seed here."""
    for item in parts(SIGNED):
        seed = item.generator(11).initial_seed()
        torch.manual_seed(seed)
        peft = merge_utils.random_pruning(item.tensor, density, rescale=True)
        torch.manual_seed(seed)
        kept = sparsify.bernoulli(item.tensor, density)
        assert torch.equal(dropped(item, density, 11), peft)
        assert torch.equal(dropped(item, density, 11, rescale=False), kept)


@pytest.mark.parametrize("weights", [*WEIGHTS, SIGNED])
def test_dare_linear_is_pefts_with_the_same_draws(weights: list[float]) -> None:
    peft = torch.zeros(SHAPE)
    for item in parts(weights):
        torch.manual_seed(item.generator(11).initial_seed())
        peft += merge_utils.dare_linear([item.tensor], torch.tensor([item.weight]), 0.4)
    assert same(ours("dare-linear", weights, density=0.4, seed=11), peft)


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_dare_ties_of_equal_weights_is_pefts_with_the_same_draws(method: Any) -> None:
    left = torch.stack([dropped(item, 0.4, 11) for item in parts([1.0] * 5)])
    mask = merge_utils.calculate_majority_sign_mask(left, method)
    peft = merge_utils.disjoint_merge(left, mask)
    assert same(ours("dare-ties", [1.0] * 5, density=0.4, seed=11, majority_sign=method), peft)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_normalized_dare_ties_is_mergekits_with_the_same_draws(weights: list[float]) -> None:
    left = [dropped(item, 0.4, 11) for item in parts(weights)]
    expected = mergekit("dare_ties", weights, left, normalize=True)
    assert same(ours("dare-ties", weights, density=0.4, seed=11, normalize=True), expected)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_slerp_is_mergekits(t: float) -> None:
    one, two, three = deltas()
    for first, second in ((one, two), (one, one / 2 + two / 99), (one, -one / 3), (two, three)):
        expected = merge_tensors([first, second], "slerp", parameters={"t": t}, base_index=0)
        found = find_method("slerp").with_options({"t": t})([Part(first), Part(second)])
        assert same(found, expected)
