"""Combining adapters: exact where it must be, whatever the order, and checked against the basis."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasb_runtime.errors import BasisMismatchError, FileFormatError, InputError
from lorasb_runtime.merging import METHODS, find_method
from lorasb_runtime.merging.combine import combine_adapters
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.storage.adapter_file import Adapter, parse_adapter, serialize_adapter
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.types import TargetModule

LINEAR = METHODS["linear"]
WEIGHTS = st.floats(-10, 10, allow_nan=False)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def make_basis(scaling: float = 1.0) -> Basis:
    targets = (TargetModule("m.0", 3, 5, 4), TargetModule("m.1", 2, 4, 4))
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for t in targets:
        tensors[f"{t.module}.A"] = torch.randn(t.rank, t.in_features, generator=generator)
        tensors[f"{t.module}.B"] = torch.randn(t.out_features, t.rank, generator=generator)
    return Basis(targets, tensors, "lora-sb", scaling)


BASIS = make_basis()


def make_adapter(cores: torch.Tensor, basis: Basis = BASIS) -> Adapter:
    return parse_adapter(serialize_adapter(Adapter(cores, basis.digest, "a")), "test")


@st.composite
def weighted(draw: st.DrawFn) -> WeightedAdapter:
    values = draw(
        st.lists(st.floats(-100, 100, width=16), min_size=BASIS.size, max_size=BASIS.size)
    )
    cores = torch.tensor(values).to(draw(DTYPES))
    return WeightedAdapter(make_adapter(cores), draw(WEIGHTS))


def bits(cores: torch.Tensor) -> bytes:
    return cores.numpy().tobytes()


@given(items=st.lists(weighted(), min_size=1, max_size=6), data=st.data())
def test_the_order_does_not_change_a_bit(items: list[WeightedAdapter], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(items))
    assert bits(combine_adapters(items, BASIS, LINEAR)) == bits(
        combine_adapters(shuffled, BASIS, LINEAR)
    )


@given(item=weighted())
def test_one_adapter_of_weight_one_is_itself_bit_for_bit(item: WeightedAdapter) -> None:
    adapter = item.adapter
    found = combine_adapters([WeightedAdapter(adapter)], BASIS, LINEAR, adapter.cores.dtype)
    assert found.dtype == adapter.cores.dtype
    assert bits(found.view(torch.uint8)) == bits(adapter.cores.view(torch.uint8))


@given(items=st.lists(weighted(), min_size=1, max_size=4), factor=WEIGHTS)
def test_it_is_linear_up_to_rounding(items: list[WeightedAdapter], factor: float) -> None:
    whole = combine_adapters(
        [dataclasses.replace(i, weight=factor * i.weight) for i in items], BASIS, LINEAR
    )
    size = sum(abs(factor * i.weight) * i.adapter.cores.double().abs() for i in items)
    parts = [combine_adapters([i], BASIS, LINEAR).double() for i in items]
    off = (whole.double() - factor * sum(parts)).abs()
    assert bool((off <= 1e-6 * size + 1e-30).all())


def test_weights_are_not_normalised() -> None:
    one = make_adapter(torch.ones(BASIS.size))
    two = make_adapter(torch.full((BASIS.size,), 2.0))
    found = combine_adapters(
        [WeightedAdapter(one, 3.0), WeightedAdapter(two, -0.25)], BASIS, LINEAR
    )
    assert torch.equal(found, torch.full((BASIS.size,), 2.5))


def test_it_is_rounded_once_and_not_term_by_term() -> None:
    """1 + 2**-8 + 2**-8 in bfloat16: term by term each small one is lost."""
    parts = [torch.full((BASIS.size,), v, dtype=torch.bfloat16) for v in (1.0, 2.0**-8, 2.0**-8)]
    items = [WeightedAdapter(make_adapter(p)) for p in parts]
    found = combine_adapters(items, BASIS, LINEAR, torch.bfloat16)
    assert torch.equal(found.float(), torch.full((BASIS.size,), 1.0 + 2.0**-7))


def test_adapters_that_were_no_file_yet_are_ordered_too() -> None:
    fresh = [Adapter(torch.randn(BASIS.size), BASIS.digest) for _ in range(3)]
    items = [WeightedAdapter(a, 1 / 3) for a in fresh]
    assert torch.equal(
        combine_adapters(items, BASIS, LINEAR), combine_adapters(items[::-1], BASIS, LINEAR)
    )


def test_what_does_not_belong_is_refused() -> None:
    other = make_basis(scaling=2.0)
    foreign = WeightedAdapter(make_adapter(torch.ones(BASIS.size), other))
    with pytest.raises(BasisMismatchError, match="found an adapter for basis sha256:"):
        combine_adapters([foreign], BASIS, LINEAR)
    short = WeightedAdapter(make_adapter(torch.ones(BASIS.size - 1)))
    with pytest.raises(FileFormatError, match="found 12 core numbers, expected 13"):
        combine_adapters([short], BASIS, LINEAR)
    with pytest.raises(InputError, match="found no adapters"):
        combine_adapters([], BASIS, LINEAR)
    huge = WeightedAdapter(make_adapter(torch.ones(BASIS.size)), 1e300)
    with pytest.raises(InputError, match="do not fit float32"):
        combine_adapters([huge], BASIS, LINEAR)


def test_an_unknown_method_lists_what_there_is() -> None:
    assert find_method("linear") is LINEAR
    with pytest.raises(InputError, match="found 'ties', expected one of linear"):
        find_method("ties")
