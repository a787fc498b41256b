"""Sampling: filters, penalties, and draws that depend on nothing but their own row."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasb_runtime.ops.sampling import BLOCK, RowSampling, greedy, penalize, sample, uniform

GREEDY = RowSampling(0.0, 0, 1.0, 0.0, 0.0)


def logits_of(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def support(probabilities: list[float], **rules: float) -> set[int]:
    """Every token that some draw can give."""
    base = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    rows = [RowSampling(**{**base, **rules}, uniform=i / 2000) for i in range(2000)]  # type: ignore[arg-type]
    return set(sample(logits_of(probabilities).repeat(2000, 1), rows).tolist())


@given(
    st.sampled_from([BLOCK, 3 * BLOCK, 3 * BLOCK + 1]),
    st.integers(0, 1 << 30),
    st.sampled_from([1, 3, 1000]),
)
def test_greedy_is_the_first_largest(vocab: int, seed: int, spread: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-spread, spread, (5, vocab), generator=generator).float()
    logits[0] = float("-inf")
    logits[1, vocab // 2] = float("inf")
    assert greedy(logits).tolist() == torch.argmax(logits, dim=-1).tolist()


def test_filters_keep_what_they_say() -> None:
    probabilities = [0.1, 0.4, 0.05, 0.3, 0.15]
    assert support(probabilities) == {0, 1, 2, 3, 4}
    assert support(probabilities, top_k=2) == {1, 3}
    assert support(probabilities, top_p=0.7) == {1, 3}
    assert support(probabilities, top_p=0.71) == {1, 3, 4}
    assert support(probabilities, min_p=0.3) == {1, 3, 4}
    assert support(probabilities, top_k=3, top_p=0.5) == {1, 3}
    assert support(probabilities, top_p=1e-9) == {1}


def test_draws_follow_the_distribution() -> None:
    probabilities = [0.5, 0.2, 0.3]
    for rules in ({}, {"top_k": 3}):
        base = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        rows = [
            RowSampling(**{**base, **rules}, uniform=uniform(1, 0, i))  # type: ignore[arg-type]
            for i in range(20000)
        ]
        tokens = sample(logits_of(probabilities).repeat(20000, 1), rows)
        found = torch.bincount(tokens, minlength=3) / 20000
        assert torch.allclose(found, torch.tensor(probabilities), atol=0.015)


def test_temperature_sharpens() -> None:
    rows = [RowSampling(0.1, 0, 1.0, 0.0, i / 100) for i in range(100)]
    assert set(sample(logits_of([0.7, 0.3]).repeat(100, 1), rows).tolist()) == {0}


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[0.0, float("-inf")]])
    assert sample(logits, [RowSampling(1.0, 0, 1.0, 0.0, 1 - 2**-53)]).tolist() == [0]


@given(st.integers(0, 2**63), st.integers(0, 9), st.integers(0, 10**6))
def test_uniform_is_a_function_into_the_unit_interval(seed: int, choice: int, at: int) -> None:
    assert 0 <= uniform(seed, choice, at) < 1
    assert uniform(seed, choice, at) == uniform(seed, choice, at)
    assert uniform(seed, choice, at) != uniform(seed, choice, at + 1)


@given(st.integers(1, 12), st.randoms())
def test_a_row_gets_the_same_token_whatever_the_batch(rows: int, rng) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(rng.randint(0, 10**6))
    logits = torch.randn(rows, 50, generator=generator)
    rules = [
        rng.choice(
            [
                GREEDY,
                RowSampling(0.8, 0, 1.0, 0.0, rng.random()),
                RowSampling(1.3, 5, 0.9, 0.02, rng.random()),
            ]
        )
        for _ in range(rows)
    ]
    together = sample(logits.clone(), rules).tolist()
    alone = [sample(logits[i : i + 1].clone(), [rules[i]]).item() for i in range(rows)]
    assert together == alone


def test_penalties_are_those_of_the_papers() -> None:
    prompt, output = torch.tensor([0, 1]), torch.tensor([1, 2, 2])
    logits = torch.tensor([2.0, -1.0, 3.0, 4.0])
    penalize(logits, prompt, output, 2.0, 0.5, 0.25)
    assert logits.tolist() == [1.0, -2.0 - 0.5 - 0.25, 1.5 - 0.5 - 0.5, 4.0]
