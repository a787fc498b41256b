"""From adapters to deltas and blends by every merge method, and what is refused."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from lorasb_runtime.errors import BasisMismatchError, FileFormatError, InputError
from lorasb_runtime.merging import METHODS, MergeMethod, Part, Space, find_method
from lorasb_runtime.merging.blend import blend_adapters
from lorasb_runtime.merging.method_deltas import method_deltas
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.storage.adapter_file import Adapter, parse_adapter, serialize_adapter
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.types import TargetModule

TARGETS = (TargetModule("m.0", 3, 9, 8), TargetModule("m.1", 2, 8, 10))
SCALING = -0.5
ANY_ORDER = sorted(name for name, method in METHODS.items() if not method.ordered)
ON_CORES = sorted(name for name, method in METHODS.items() if method.space is not Space.DELTA)
ON_DELTAS = sorted(METHODS.keys() - set(ON_CORES))


def make_basis(seed: int = 0, deficient: bool = False) -> Basis:
    """Neither B nor A orthonormal; `deficient`: two columns of each B are the same."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for t in TARGETS:
        tensors[f"{t.module}.A"] = torch.randn(t.rank, t.in_features, generator=generator)
        tensors[f"{t.module}.B"] = torch.randn(t.out_features, t.rank, generator=generator)
        if deficient:
            tensors[f"{t.module}.B"][:, 1] = tensors[f"{t.module}.B"][:, 0]
    return Basis(TARGETS, tensors, "imported", SCALING)


BASIS = make_basis()


def make_adapter(seed: int, basis: Basis = BASIS, dtype: torch.dtype = torch.float32) -> Adapter:
    cores = torch.randn(basis.size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    adapter = Adapter(cores, basis.digest, f"a{seed}")
    return parse_adapter(serialize_adapter(adapter), "test")


def make_items(count: int = 3, basis: Basis = BASIS) -> list[WeightedAdapter]:
    return [WeightedAdapter(make_adapter(i, basis), (0.7, 1.5, -0.25)[i]) for i in range(count)]


def make(name: str, **options: Any) -> MergeMethod:
    takes_density = "ties" in name or "dare" in name
    return find_method(name).with_options(
        {**({"density": 0.5} if takes_density else {}), **options}
    )


def whole(
    method: MergeMethod, items: list[WeightedAdapter], basis: Basis = BASIS
) -> list[torch.Tensor]:
    deltas = method_deltas(items, basis, method)
    everything = slice(None)
    return [deltas(i, torch.float32).block(everything, everything) for i in range(len(TARGETS))]


def delta(item: WeightedAdapter, index: int, basis: Basis = BASIS) -> Part:
    """One adapter's delta [out, in] of a target by its definition, in float64."""
    module = TARGETS[index].module
    b, a = basis.b(module).double(), basis.a(module).double()
    core = basis.core(item.adapter.cores, index).double()
    return Part(basis.scaling * (b @ core @ a), item.weight, module, item.adapter.version)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ANY_ORDER)
def test_the_order_does_not_change_a_bit(name: str) -> None:
    items = make_items()
    expected = whole(make(name), items)
    for order in ([1, 2, 0], [2, 1, 0]):
        found = whole(make(name), [items[i] for i in order])
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_slerp_keeps_the_order() -> None:
    items = make_items(2)
    there, back = whole(make("slerp", t=0.2), items), whole(make("slerp", t=0.2), items[::-1])
    assert not close(there[0], back[0])
    assert close(there[0], whole(make("slerp", t=0.8), items[::-1])[0])


@pytest.mark.parametrize("name", [*ON_DELTAS, "linear", "task-arithmetic"])
def test_the_method_sees_whole_deltas(name: str) -> None:
    """For sums the way through the cores is exact, so it is the same."""
    items = sorted(make_items(), key=lambda item: item.adapter.version)
    for index, found in enumerate(whole(make(name), items)):
        assert found.dtype == torch.float32
        assert close(found, make(name)([delta(item, index) for item in items]))


@pytest.mark.parametrize("deficient", [False, True])
def test_slerp_on_cores_is_slerp_on_deltas_on_any_basis(deficient: bool) -> None:
    basis = make_basis(1, deficient)
    items = make_items(2, basis)
    method = make("slerp", t=0.3)
    for index, found in enumerate(whole(method, items, basis)):
        assert close(found, method([delta(item, index, basis) for item in items]))


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_slerp_ends_at_the_adapters(t: float) -> None:
    items = [WeightedAdapter(make_adapter(i)) for i in range(2)]
    blended = blend_adapters(items, "x", method=make("slerp", t=t), basis=BASIS)
    assert torch.allclose(blended.cores, items[int(t)].adapter.cores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["core-ties", "core-dare"])
def test_core_methods_see_each_targets_core(name: str) -> None:
    items = sorted(make_items(), key=lambda item: item.adapter.version)
    blended = blend_adapters(items, "x", method=make(name), basis=BASIS)
    for index, target in enumerate(TARGETS):
        parts = [
            Part(BASIS.core(i.adapter.cores, index).double(), i.weight, target.module, v)
            for i in items
            if (v := i.adapter.version)
        ]
        assert close(BASIS.core(blended.cores, index), make(name)(parts))


@pytest.mark.parametrize("name", ON_CORES)
def test_a_blend_has_the_deltas_that_a_merge_adds(name: str) -> None:
    items = make_items(2)
    blended = blend_adapters(items, "x", method=make(name), basis=BASIS)
    merged = whole(make(name), items)
    for index, expected in enumerate(merged):
        assert close(delta(WeightedAdapter(blended), index).tensor, expected)


def test_core_ties_is_another_method_than_ties() -> None:
    found, other = whole(make("core-ties"), make_items()), whole(make("ties"), make_items())
    assert not close(found[0], other[0])


def test_dare_drops_the_same_for_whoever_asks_first() -> None:
    items = make_items()
    expected = whole(make("dare-ties", seed=3), items)
    deltas = method_deltas(items, BASIS, make("dare-ties", seed=3))
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda i: deltas(i % 2, torch.float64), range(8)))
    for i, one in enumerate(made):
        block = one.block(slice(2, 5), slice(1, 3))
        assert block.dtype == torch.float64
        assert torch.equal(block, expected[i % 2][2:5, 1:3].double())
    assert not close(whole(make("dare-ties", seed=4), items)[0], expected[0])


def test_one_adapter_twice_is_one_of_the_sum_of_weights() -> None:
    one = WeightedAdapter(make_adapter(0), 0.5)
    both = [one, dataclasses.replace(one, weight=1.0), WeightedAdapter(make_adapter(1))]
    summed = [dataclasses.replace(one, weight=1.5), both[2]]
    for name in ANY_ORDER:
        assert torch.equal(whole(make(name), both)[0], whole(make(name), summed)[0])


def test_sums_are_scaled_before_the_one_rounding() -> None:
    """Which float64 weights show: nothing was rounded to float32 on the way."""
    basis = dataclasses.replace(BASIS, scaling=1.25)
    one = Adapter(torch.ones(basis.size), basis.digest)
    deltas = method_deltas([WeightedAdapter(one, 0.1)], basis, make("linear"))
    b, a = basis.b("m.0").double(), basis.a("m.0").double()
    core = torch.full((3, 3), 0.1 * 1.25, dtype=torch.float64)
    found = deltas(0, torch.float64).block(slice(None), slice(None))
    assert torch.equal(found, (b @ core) @ a)


def test_what_does_not_belong_is_refused() -> None:
    other = make_basis(7)
    linear = make("linear")
    with pytest.raises(BasisMismatchError, match="found an adapter for basis sha256:"):
        method_deltas(make_items(1, other), BASIS, linear)
    with pytest.raises(BasisMismatchError, match="found an adapter for basis sha256:"):
        blend_adapters(make_items(1, other), "x", method=linear, basis=BASIS)
    short = Adapter(torch.ones(BASIS.size - 1), BASIS.digest)
    with pytest.raises(FileFormatError, match="found 12 core numbers, expected 13"):
        method_deltas([WeightedAdapter(short)], BASIS, linear)
    with pytest.raises(InputError, match="do not fit float32"):
        method_deltas([WeightedAdapter(make_adapter(0), 1e300)], BASIS, linear)
    for name in METHODS:
        with pytest.raises(InputError, match="found no adapters"):
            method_deltas([], BASIS, make(name))
    for name in ("ties", "dare-linear", "core-ties", "linear"):  # before the first target
        items = [WeightedAdapter(make_adapter(i), w) for i, w in enumerate((1.0, -1.0))]
        with pytest.raises(InputError, match=r"found (a sum of 0|weight -1.0), expected"):
            method_deltas(items, BASIS, make(name, normalize=True))
    for count in (1, 3):
        message = f"method slerp: found {count} adapters, expected exactly 2"
        with pytest.raises(InputError, match=message):
            method_deltas(make_items(count), BASIS, make("slerp"))


@pytest.mark.parametrize("name", ON_DELTAS)
def test_a_method_that_leaves_the_basis_makes_no_adapter(name: str) -> None:
    message = f"method {name}: .*leaves the basis.*core-ties, core-dare; or use `lorasb merge`"
    with pytest.raises(InputError, match=message):
        blend_adapters(make_items(), "x", method=make(name), basis=BASIS)


@pytest.mark.parametrize("name", ["core-ties", "core-dare", "slerp"])
def test_a_blend_by_targets_needs_the_basis(name: str) -> None:
    with pytest.raises(InputError, match=f"method {name}: found no basis, expected the adapters'"):
        blend_adapters(make_items(2), "x", method=make(name))
