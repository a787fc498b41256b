"""Blends of adapters: exact sums whatever the order, rounded once."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasb_runtime.errors import BasisMismatchError, FileFormatError, InputError
from lorasb_runtime.merging import find_method
from lorasb_runtime.merging.blend import (
    blend_adapters,
    blend_version,
    exact_blend,
)
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.ops.core_matmul import resident_cores
from lorasb_runtime.ops.rounding import round_once
from lorasb_runtime.storage.adapter_file import (
    Adapter,
    parse_adapter,
    serialize_adapter,
    version_of,
)

SIZE = 5
BASIS = "sha256:" + "0" * 64
NARROW = st.sampled_from([torch.bfloat16, torch.float16])
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
WEIGHTS = st.floats(-100, 100, allow_nan=False)


def make(values: list[float], dtype: torch.dtype = torch.float32, name: str = "a") -> Adapter:
    cores = torch.tensor(values, dtype=torch.float64).to(dtype)
    return parse_adapter(serialize_adapter(Adapter(cores, BASIS, name)), "test")


@st.composite
def weighted(draw: st.DrawFn) -> WeightedAdapter:
    values = draw(st.lists(st.floats(-100, 100, width=16), min_size=SIZE, max_size=SIZE))
    return WeightedAdapter(make(values, draw(DTYPES)), draw(WEIGHTS))


def bits(cores: torch.Tensor) -> bytes:
    return cores.view(torch.uint8).numpy().tobytes()


ITEMS = st.lists(weighted(), min_size=1, max_size=6)


@given(items=ITEMS, data=st.data(), dtype=DTYPES, scaling=st.floats(0.01, 4))
def test_the_order_does_not_change_a_bit(
    items: list[WeightedAdapter], data: st.DataObject, dtype: torch.dtype, scaling: float
) -> None:
    shuffled = data.draw(st.permutations(items))
    here, there = blend_adapters(items, "x", torch.float32), blend_adapters(shuffled, "x")
    assert serialize_adapter(here) == serialize_adapter(there)
    if dtype != torch.float16:  # whose range a sum can leave
        one, two = (resident_cores(exact_blend(i), scaling, dtype) for i in (items, shuffled))
        assert bits(one) == bits(two)


@given(item=weighted())
def test_one_adapter_of_weight_one_is_itself_bit_for_bit(item: WeightedAdapter) -> None:
    cores = item.adapter.cores
    alone = [WeightedAdapter(item.adapter)]
    assert bits(blend_adapters(alone, "x", cores.dtype).cores) == bits(cores)
    assert bits(resident_cores(exact_blend(alone), 1.0, cores.dtype)) == bits(cores)


@given(items=ITEMS, factor=WEIGHTS)
def test_it_is_linear_up_to_rounding(items: list[WeightedAdapter], factor: float) -> None:
    scaled = [WeightedAdapter(i.adapter, factor * i.weight) for i in items]
    whole = blend_adapters(scaled, "x").cores.double()
    parts = sum(blend_adapters([i], "x").cores.double() for i in items)
    size = sum(abs(factor * i.weight) * i.adapter.cores.double().abs() for i in items)
    assert bool(((whole - factor * parts).abs() <= 1e-6 * size + 1e-30).all())


@given(item=weighted(), weights=st.lists(WEIGHTS, min_size=1, max_size=5))
def test_one_version_several_times_adds_its_weights(
    item: WeightedAdapter, weights: list[float]
) -> None:
    many = [WeightedAdapter(item.adapter, w) for w in weights]
    total = float(sum(Fraction(w) for w in weights))
    once = blend_adapters([WeightedAdapter(item.adapter, total)], "x")
    blended = blend_adapters(many, "x")
    assert serialize_adapter(blended) == serialize_adapter(once)
    assert [part["weight"] for part in blended.info["blend"]] == [total]


def test_nothing_is_normalised_unless_asked() -> None:
    items = [WeightedAdapter(make([1.0] * SIZE), 3.0), WeightedAdapter(make([2.0] * SIZE), -1.0)]
    assert blend_adapters(items, "x").cores.tolist() == [1.0] * SIZE
    asked = find_method("linear").with_options({"normalize": True})
    blended = blend_adapters(items, "x", method=asked)
    assert blended.cores.tolist() == [0.5] * SIZE
    assert (blended.info["method"], blended.info["options"]) == ("linear", {"normalize": True})
    assert sorted(part["weight"] for part in blended.info["blend"]) == [-1.0, 3.0]
    nothing = [WeightedAdapter(items[0].adapter, w) for w in (1.0, -1.0)]
    with pytest.raises(InputError, match="found a sum of 0"):
        blend_adapters(nothing, "x", method=asked)


def test_adapters_that_were_no_file_yet_are_ordered_too() -> None:
    items = [WeightedAdapter(Adapter(torch.randn(SIZE), BASIS), 1 / 3) for _ in range(3)]
    assert bits(exact_blend(items)) == bits(exact_blend(items[::-1]))


def test_it_is_rounded_once_and_not_term_by_term() -> None:
    """1 + 2**-8 + 2**-8 in bfloat16: term by term each small one is lost."""
    items = [WeightedAdapter(make([v] * SIZE, torch.bfloat16)) for v in (1.0, 2.0**-8)]
    items.append(WeightedAdapter(make([2.0**-8] * SIZE, torch.bfloat16, "other")))
    assert blend_adapters(items, "x", torch.bfloat16).cores.tolist() == [1.0 + 2.0**-7] * SIZE


def nearest(value: float, dtype: torch.dtype) -> list[float]:
    """The one or, for a tie, two numbers of `dtype` nearest to a value, by exact arithmetic."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    finite = bits[torch.isfinite(bits)]
    window = finite[(finite - value).abs().argsort()[:4]].tolist()
    off = {v: abs(Fraction(v) - Fraction(value)) for v in window}
    return [v for v in window if off[v] == min(off.values())]


@given(value=st.floats(-60000, 60000), dtype=NARROW)
def test_rounding_once_gives_the_nearest(value: float, dtype: torch.dtype) -> None:
    found = round_once(torch.tensor([value], dtype=torch.float64), dtype)
    assert found.dtype == dtype
    assert float(found[0]) in nearest(value, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_little_beside_a_tie_is_not_taken_for_one(dtype: torch.dtype, sign: float) -> None:
    half = torch.finfo(dtype).eps / 2  # 1 + half lies between 1 and the next number
    for little, expected in ((2.0**-40, 1 + 2 * half), (-(2.0**-40), 1.0), (0.0, 1.0)):
        x = torch.tensor([sign * (1 + half + little)], dtype=torch.float64)
        assert round_once(x, dtype).tolist() == [sign * expected]
    twice = torch.tensor([1 + half + 2.0**-40], dtype=torch.float64).to(dtype)
    assert twice.tolist() == [1.0]  # what torch alone does, without which this file were needless
    edge = torch.tensor([1e300, -1e300, float("inf"), 0.0, 1e-300], dtype=torch.float64)
    inf = float("inf")
    assert round_once(edge, dtype).tolist() == [inf, -inf, inf, 0.0, 0.0]


def test_a_blend_in_a_slot_is_scaled_before_the_one_rounding() -> None:
    """1.1 * (1 + 2**-7) in bfloat16: rounding the sum, then the product gives another number."""
    items = [WeightedAdapter(make([1.0] * SIZE)), WeightedAdapter(make([2.0**-8] * SIZE), 1.5)]
    exact = (1 + 1.5 * 2.0**-8) * 1.1
    found = resident_cores(exact_blend(items), 1.1, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert found.tolist()[0] in nearest(exact, torch.bfloat16)
    with pytest.raises(InputError, match="do not fit float16"):
        blend_adapters([WeightedAdapter(make([1e4] * SIZE), 10.0)], "x", torch.float16)


@given(st.dictionaries(st.sampled_from("abcdef"), WEIGHTS, min_size=1), st.data())
def test_a_blend_is_known_by_its_parts_alone(
    weights: dict[str, float], data: st.DataObject
) -> None:
    named = {version_of(k.encode()): w for k, w in weights.items()}
    again = dict(data.draw(st.permutations(list(named.items()))))
    assert blend_version(named) == blend_version(again)
    assert len(blend_version(named)) == 64 and blend_version(named) not in named
    changed = {**named, next(iter(named)): next(iter(named.values())) + 1000}
    assert blend_version(changed) != blend_version(named)


def test_what_does_not_belong_together_is_refused() -> None:
    one = WeightedAdapter(make([1.0] * SIZE))
    other = WeightedAdapter(Adapter(torch.ones(SIZE), "sha256:" + "1" * 64, "b", version="v"))
    with pytest.raises(BasisMismatchError, match="found one for basis sha256:1"):
        blend_adapters([one, other], "x")
    with pytest.raises(FileFormatError, match="found 4 core numbers, expected 5"):
        blend_adapters([one, WeightedAdapter(make([1.0] * 4, name="b"))], "x")
    with pytest.raises(InputError, match="found no adapters"):
        blend_adapters([], "x")
