"""Checkpoints with frozen pairs (LoRA-SB, LoRA-XS, TinyLoRA): one basis, and the cores as they are.

Nothing is computed: what cannot be kept exactly is refused.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import reduce

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.importing.foreign import Factors, ForeignAdapter
from lorasb_runtime.importing.own_basis import describe_target
from lorasb_runtime.importing.peft_tensors import in_model_order
from lorasb_runtime.ops.rounding import round_once
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.types import BaseModelId

OTHER_WAYS = (
    "import them onto one basis with --basis, make a joint one with `lorasb compress`, or import "
    "each into a folder of its own"
)
LARGEST_FACTOR = 1 << 24  # times a float32 number it is exact in float64


def shared_basis(
    adapters: Sequence[ForeignAdapter], base_model: BaseModelId | None, order: Iterable[str] | None
) -> Basis:
    """The pairs that the checkpoints hold, bit for bit, and their common scaling.

    A module that only some of them have is a target too; the others' cores for it are zeros.
    order: the model's modules, where it is known. Raises InputError where two checkpoints have
    different pairs for one module, and for a rank that no basis can have.
    """
    pairs: dict[str, tuple[Factors, ForeignAdapter]] = {}
    for adapter in adapters:
        for module, factors in factors_of(adapter).items():
            _check_rank(adapter, module, factors)
            first, owner = pairs.setdefault(module, (factors, adapter))
            if not (_equal(first.b, factors.b) and _equal(first.a, factors.a)):
                raise InputError(
                    f"{adapter.source}: found another basis than {owner.source} has, at "
                    f"{module}; expected one that all share: {OTHER_WAYS}"
                )
    names = in_model_order(pairs) if order is None else [name for name in order if name in pairs]
    targets, tensors = [], {}
    for module in names:
        factors, owner = pairs[module]
        transposed = module in owner.transposed
        targets.append(describe_target(module, factors, factors.a.shape[0], transposed))
        tensors[f"{module}.A"] = factors.a.float().contiguous()
        tensors[f"{module}.B"] = factors.b.float().contiguous()
    info = {"importer": adapters[0].format, **adapters[0].info}
    scaling = _common_scaling(adapters)
    return Basis(tuple(targets), tensors, "imported", scaling, base_model, info)


def shared_cores(adapter: ForeignAdapter, basis: Basis) -> torch.Tensor:
    """The checkpoint's cores [D] on the basis that was made of it, in their own dtype.

    Where its scaling is not the basis' the quotient goes into the cores, if that changes no bit
    (a power of two, say), in float32 where need be. Raises InputError where it would.
    """
    modules = factors_of(adapter)
    own = reduce(
        torch.promote_types, (f.core.dtype for f in modules.values() if f.core is not None)
    )
    for dtype in (own, torch.float32):
        cores = _exact_cores(modules, basis, dtype)
        if cores is not None:
            return cores
    others = sorted({f.scaling for f in modules.values()} - {basis.scaling})
    raise InputError(
        f"{adapter.source}: found a scaling of {others[0]!r} beside {basis.scaling!r} on the same "
        f"basis, which the cores cannot take over without rounding; {OTHER_WAYS}"
    )


def factors_of(adapter: ForeignAdapter) -> dict[str, Factors]:
    """The modules of an adapter with frozen pairs."""
    modules = {}
    for module, delta in adapter.modules.items():
        assert adapter.shared and isinstance(delta, Factors)
        modules[module] = delta
    return modules


def _exact_cores(
    modules: dict[str, Factors], basis: Basis, dtype: torch.dtype
) -> torch.Tensor | None:
    """None where a core is no number of `dtype` any more once the scaling is the basis'."""
    cores = torch.zeros(basis.size, dtype=dtype)
    for index, target in enumerate(basis.targets):
        factors = modules.get(target.module)
        if factors is None:
            continue
        assert factors.core is not None
        exact = _times(factors.core, Fraction(factors.scaling) / Fraction(basis.scaling))
        if exact is None or not torch.equal(round_once(exact, dtype).double(), exact):
            return None
        basis.core(cores, index).copy_(exact)
    return cores


def _times(core: torch.Tensor, factor: Fraction) -> torch.Tensor | None:
    """core * factor in float64, or None where that could round."""
    return core.double() * float(factor) if _is_exact(factor) else None


def _is_exact(factor: Fraction) -> bool:
    """Whether float64 holds the product of every float32 number with it."""
    numerator, denominator = factor.as_integer_ratio()
    return abs(numerator) <= LARGEST_FACTOR and denominator & (denominator - 1) == 0


def _common_scaling(adapters: Sequence[ForeignAdapter]) -> float:
    """The one that all others are an exact multiple of, or else the most frequent."""
    counts = Counter(f.scaling for adapter in adapters for f in factors_of(adapter).values())
    by_frequency = [scaling for scaling, _ in counts.most_common()]
    for scaling in by_frequency:
        if all(_is_exact(Fraction(other) / Fraction(scaling)) for other in counts):
            return scaling
    return by_frequency[0]


def _check_rank(adapter: ForeignAdapter, module: str, factors: Factors) -> None:
    rank, most = factors.a.shape[0], min(factors.out_features, factors.in_features)
    if rank > most:
        raise InputError(
            f"{adapter.source}: found rank {rank} for {module}, expected at most {most}, the "
            "smaller side of its weight"
        )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.float(), other.float())
