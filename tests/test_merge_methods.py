"""Merge methods as pure functions: what must hold of each, whatever the numbers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasb_runtime.errors import InputError
from lorasb_runtime.merging import METHODS, MergeMethod, Part, find_method
from lorasb_runtime.merging.sparsify import drop, trim

SIZE = (2, 3)
NUMBERS = st.integers(-64, 64).map(lambda n: n / 16)  # small sums of these are exact
WEIGHTS = st.sampled_from([-2.0, -0.5, 0.25, 1.0, 3.0])
ABOVE_ZERO = st.sampled_from([0.25, 0.5, 1.0, 3.0])
DENSITIES = st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0])
ALL = sorted(METHODS)
SUMS = ["linear", "task-arithmetic", "dare-linear", "core-dare"]
ELECTIONS = ["ties", "core-ties", "dare-ties"]
DARE = ["dare-linear", "core-dare", "dare-ties"]


quick = settings(max_examples=40, deadline=None)  # of those that run once for each method


def make(name: str, density: float = 0.5, **options: Any) -> MergeMethod:
    """The method with these options; with `density` where it takes one."""
    takes_density = name in ELECTIONS or name in DARE
    return find_method(name).with_options(
        {**({"density": density} if takes_density else {}), **options}
    )


def part(values: Any, weight: float = 1.0, version: str = "v", module: str = "m") -> Part:
    return Part(torch.tensor(values, dtype=torch.float64), weight, module, version)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    count = SIZE[0] * SIZE[1]
    values = draw(st.lists(NUMBERS, min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float64).view(SIZE)


@st.composite
def some_parts(
    draw: st.DrawFn, weights: st.SearchStrategy[float] = WEIGHTS, count: int | None = None
) -> list[Part]:
    number = count or draw(st.integers(1, 5))
    return [Part(draw(tensors()), draw(weights), "m", f"v{i}") for i in range(number)]


def scaled(parts: list[Part], factor: float) -> list[Part]:
    return [Part(p.tensor, factor * p.weight, p.module, p.version) for p in parts]


@pytest.mark.parametrize("name", ALL)
@quick
@given(data=st.data(), density=DENSITIES)
def test_the_inputs_stay_as_they_are(name: str, data: st.DataObject, density: float) -> None:
    parts = data.draw(some_parts(count=METHODS[name].count))
    before = [p.tensor.clone() for p in parts]
    make(name, density)(parts)
    assert all(torch.equal(b, p.tensor) for b, p in zip(before, parts, strict=True))


@pytest.mark.parametrize("name", [name for name in ALL if name != "slerp"])
@quick
@given(tensor=tensors())
def test_one_adapter_of_weight_one_at_full_density_is_itself(
    name: str, tensor: torch.Tensor
) -> None:
    assert torch.equal(make(name, 1.0)([Part(tensor)]), tensor)


@pytest.mark.parametrize("name", ALL)
@quick
@given(data=st.data(), density=DENSITIES, factor=st.sampled_from([0.125, 2.0, 16.0]))
def test_scaled_weights_scale_the_result(
    name: str, data: st.DataObject, density: float, factor: float
) -> None:
    """Bit for bit, as the factors are powers of two; so nothing is normalised unasked."""
    parts = data.draw(some_parts(count=METHODS[name].count))
    method = make(name, density)
    assert torch.equal(method(scaled(parts, factor)), factor * method(parts))


@pytest.mark.parametrize("name", [*SUMS, *ELECTIONS])
@quick
@given(parts=some_parts(ABOVE_ZERO), density=DENSITIES)
def test_normalized_weights_do_not_scale_the_result(
    name: str, parts: list[Part], density: float
) -> None:
    method = make(name, density, normalize=True)
    assert torch.equal(method(scaled(parts, 4.0)), method(parts))


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("linear", "slerp")])
@quick
@given(parts=some_parts(), density=DENSITIES)
def test_lambda_multiplies_the_result(name: str, parts: list[Part], density: float) -> None:
    options = {"lambda": -0.5}
    assert torch.equal(make(name, density, **options)(parts), -0.5 * make(name, density)(parts))


@pytest.mark.parametrize("name", SUMS)
@quick
@given(parts=some_parts(), density=DENSITIES)
def test_sums_are_the_sums_of_what_each_adapter_gives(
    name: str, parts: list[Part], density: float
) -> None:
    method = make(name, density)
    assert torch.allclose(method(parts), torch.stack([method([p]) for p in parts]).sum(0))


@pytest.mark.parametrize("name", ["dare-linear", "core-dare"])
@quick
@given(parts=some_parts())
def test_dare_at_full_density_is_task_arithmetic(name: str, parts: list[Part]) -> None:
    assert torch.equal(make(name, 1.0)(parts), make("task-arithmetic")(parts))


@given(parts=some_parts(ABOVE_ZERO), density=DENSITIES)
def test_ties_of_one_sign_is_the_mean_of_what_is_left(parts: list[Part], density: float) -> None:
    positive = [Part(p.tensor.abs() + 1, p.weight) for p in parts]
    found = make("ties", density)(positive)
    left = torch.stack([p.weight * trim(p.tensor, density) for p in positive])
    assert torch.allclose(found, left.sum(0) / (left > 0).sum(0).clamp(min=1))


@pytest.mark.parametrize("name", ELECTIONS)
@quick
@given(parts=some_parts(), density=DENSITIES)
def test_an_adapter_of_weight_zero_has_no_vote(
    name: str, parts: list[Part], density: float
) -> None:
    method = make(name, density)
    silent = Part(torch.full(SIZE, 100.0, dtype=torch.float64), 0.0, "m", "silent")
    assert torch.equal(method([*parts, silent]), method(parts))


@pytest.mark.parametrize(
    ("columns", "weights", "options", "expected"),
    [  # one entry, of three adapters
        ([4.0, -1.0, -2.0], [1, 1, 1], {}, 4.0),  # the sum is positive
        ([4.0, -1.0, -2.0], [1, 1, 1], {"majority_sign": "frequency"}, -1.5),
        ([2.0, -1.0, -1.0], [1, 1, 1], {}, 2.0),  # a sum of 0 counts as positive
        ([3.0, -1.0, 0.0], [1, 1, 1], {"majority_sign": "frequency"}, 3.0),  # and one vote each
        ([-3.0, 1.0, 1.0], [1, 1, 1], {}, -3.0),
        ([4.0, -1.0, -2.0], [0.5, 1, 1], {}, -1.5),  # weighted, the sum is negative
        ([4.0, -1.0, 2.0], [-1, 1, 1], {}, -2.5),  # a negative weight turns its vote round
        ([4.0, 1.0, 0.0], [1, 1, 1], {}, 2.5),  # an entry of 0 is none of those that agree
        ([4.0, 1.0, -9.0], [3, 1, 1], {}, 6.5),  # 12 + 1 by number
        ([4.0, 1.0, -9.0], [3, 1, 1], {"normalize": True}, 3.25),  # and by weight
        ([0.0, 0.0, 0.0], [1, 1, 1], {"normalize": True}, 0.0),
    ],
)
def test_the_sign_is_elected(
    columns: list[float], weights: list[float], options: dict[str, Any], expected: float
) -> None:
    parts = [part([c], float(w)) for c, w in zip(columns, weights, strict=True)]
    for name in ELECTIONS:
        assert make(name, 1.0, **options)(parts).tolist() == [expected]


def test_large_tensors_are_elected_on_in_pieces() -> None:
    generator = torch.Generator().manual_seed(0)
    large = [Part(torch.randn(300, 500, generator=generator), w) for w in (1.0, 0.5, -2.0)]
    found = make("ties", 1.0)(large)
    rows = [make("ties", 1.0)([p.with_tensor(p.tensor[i]) for p in large]) for i in range(300)]
    assert torch.equal(found, torch.stack(rows))


def test_weights_that_cannot_be_normalized_by_are_refused() -> None:
    parts = [part([1.0], 1.0), part([1.0], -1.0)]
    for name in SUMS:
        with pytest.raises(InputError, match="found a sum of 0"):
            make(name, normalize=True)(parts)
    for name in ELECTIONS:
        with pytest.raises(InputError, match=r"found weight -1.0, expected weights above 0"):
            make(name, normalize=True)(parts)


@given(tensor=tensors(), density=st.floats(0.01, 1.0))
def test_trim_keeps_the_largest_and_of_equals_the_first(
    tensor: torch.Tensor, density: float
) -> None:
    flat = tensor.flatten()
    count = max(1, int(density * flat.numel()))
    first_largest = sorted(range(flat.numel()), key=lambda i: (-abs(flat[i].item()), i))[:count]
    expected = torch.zeros_like(flat)
    expected[first_largest] = flat[first_largest]
    assert torch.equal(trim(tensor, density), expected.view(SIZE))


@given(tensor=tensors(), density=DENSITIES, seed=st.integers(0, 2**63 - 1))
def test_what_drop_leaves_is_divided_by_the_density(
    tensor: torch.Tensor, density: float, seed: int
) -> None:
    item = Part(tensor, 1.0, "m", "v")
    plain, rescaled = (drop(tensor, density, r, item.generator(seed)) for r in (False, True))
    assert bool(((plain == tensor) | (plain == 0)).all())
    assert torch.equal(rescaled, plain / density)


def test_drop_keeps_the_expected_share_and_sum() -> None:
    ones = torch.ones(400, 500)
    left = drop(ones, 0.3, True, Part(ones).generator(5))
    assert float((left > 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(left.mean()) == pytest.approx(1.0, abs=0.02)


def kept(seed: int = 0, module: str = "m", version: str = "v", **more: Any) -> list[bool]:
    ones = torch.ones(64, **more)
    return (drop(ones, 0.5, False, Part(ones, 1.0, module, version).generator(seed)) > 0).tolist()


def test_what_is_dropped_depends_on_seed_module_and_version_alone() -> None:
    assert kept() == kept(dtype=torch.float64)
    masks = [kept(), kept(seed=1), kept(module="n"), kept(version="w"), kept(module="mv")]
    assert all(a != b for i, a in enumerate(masks) for b in masks[:i])


def test_what_is_dropped_is_the_same_in_every_release() -> None:
    """Whoever wrote a seed down expects the same merge again."""
    assert "".join("01"[k] for k in kept(7, "model.layers.0.self_attn.q_proj", "ab" * 32)) == (
        "1010001111011111100101110101011001001010011101101000111001001101"
    )


def test_slerp_goes_along_the_arc() -> None:
    x, y = part([2.0, 0.0]), part([0.0, 2.0])
    assert make("slerp", t=0.0)([x, y]).tolist() == [2.0, 0.0]
    assert make("slerp", t=1.0)([x, y]).tolist() == pytest.approx([0.0, 2.0])
    assert make("slerp")([x, y]).tolist() == pytest.approx([2**0.5, 2**0.5])
    assert make("slerp", t=1 / 3)([x, y]).tolist() == pytest.approx([3**0.5, 1.0])
    turned = part([0.0, 2.0], -1.0)
    assert make("slerp")([x, turned]).tolist() == pytest.approx([2**0.5, -(2**0.5)])


def test_slerp_takes_the_straight_line_where_there_is_no_arc() -> None:
    for other in ([3.0, 0.0], [-3.0, 0.0]):
        found = make("slerp", t=0.25)([part([1.0, 0.0]), part(other)])
        assert found.tolist() == [0.75 + 0.25 * other[0], 0.0]
    half = make("slerp")([part([1.0, 0.0]), part([0.0, 0.0])])  # a right angle, as in mergekit
    assert half.tolist() == pytest.approx([0.5**0.5, 0.0])


@given(parts=some_parts(count=2), t=st.floats(0, 1))
def test_slerp_backwards_is_slerp_from_the_other_end(parts: list[Part], t: float) -> None:
    there, back = make("slerp", t=t)(parts), make("slerp", t=1 - t)(parts[::-1])
    assert torch.allclose(there, back, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in ALL if name != "slerp"])
def test_parts_may_come_one_by_one(name: str) -> None:
    """So that a method that sums needs no room for all deltas at once."""
    parts = [part([[1.0, -2.0]], 0.5, "a"), part([[3.0, 4.0]], 2.0, "b")]

    def one_by_one() -> Iterator[Part]:
        yield from parts

    assert torch.equal(make(name)(one_by_one()), make(name)(parts))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("median", {}, "method: found 'median', expected one of linear, task-arithmetic, slerp"),
        ("linear", {"seed": 1}, "method linear: found option seed, expected only normalize"),
        ("slerp", {"normalize": True}, "method slerp: found option normalize, expected only t"),
        ("ties", {"t": 0.5}, "found option t, expected only density, lambda, majority-sign, norma"),
        ("dare-ties", {}, "method dare-ties: found no density, expected one"),
        ("ties", {"density": 0.0}, "density: found 0.0, expected one above 0.0 to 1.0"),
        ("ties", {"density": 1.5}, "density: found 1.5, expected one above 0.0 to 1.0"),
        ("ties", {"density": "1"}, "density: found '1', expected a finite number"),
        ("ties", {"density": True}, "density: found True, expected a finite number"),
        ("ties", {"lambda": float("inf")}, "lambda: found inf, expected a finite number"),
        ("ties", {"majority_sign": "most"}, "majority-sign: found 'most', expected total or freq"),
        ("ties", {"normalize": 1}, "normalize: found 1, expected true or false"),
        ("slerp", {"t": -0.1}, "method slerp: t: found -0.1, expected one from 0.0 to 1.0"),
        ("dare-linear", {"density": 0.5, "seed": 1.5}, "seed: found 1.5, expected a whole number"),
        ("dare-linear", {"density": 0.5, "seed": -1}, "seed: found -1, expected one from 0 to"),
    ],
)
def test_wrong_options_are_refused_by_name(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as raised:
        find_method(name).with_options(options)
    assert message in str(raised.value)


def test_a_method_knows_all_its_options() -> None:
    assert find_method("ties").with_options({"density": 0.5}).options == {
        "density": 0.5,
        "majority_sign": "total",
        "lambda": 1.0,
        "normalize": False,
    }
