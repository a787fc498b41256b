"""Many adapters of other programs that are to share one basis: what they have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasb_runtime.basis.stack import LowRank, Stack, make_stack
from lorasb_runtime.errors import BasisMismatchError
from lorasb_runtime.importing.folder import CheckpointFolder
from lorasb_runtime.importing.foreign import Delta, Factors, ForeignAdapter
from lorasb_runtime.importing.model import Model, check_modules
from lorasb_runtime.importing.peft_tensors import in_model_order
from lorasb_runtime.importing.readers import read_foreign
from lorasb_runtime.types import BaseModelId, Report


@dataclass(frozen=True)
class Shape:
    """One module's weight; transposed: the model stores it as [in, out]."""

    out_features: int
    in_features: int
    transposed: bool


@dataclass(frozen=True)
class Collection:
    """Adapters of one model. Their factors are memory-mapped and read when a stack is made.

    shapes: every module that some adapter changes, in the model's order.
    """

    adapters: tuple[ForeignAdapter, ...]
    shapes: dict[str, Shape]
    base_model: BaseModelId | None

    @property
    def base_models(self) -> list[str]:
        """The names that the checkpoints give, each once."""
        return list(dict.fromkeys(a.base_model for a in self.adapters if a.base_model))

    def stack(self, module: str, places: Sequence[int]) -> Stack:
        """The deltas that the adapters at `places` have in one module, in this order."""
        return make_stack([_low_rank(self.adapters[p].modules.get(module)) for p in places])


def open_collection(paths: Sequence[Path], model: Model | None, report: Report) -> Collection:
    """Read and check all the checkpoints' headers, configurations and numbers.

    Raises BasisMismatchError where they, or the model, do not belong together, and what readers
    raise for what they cannot read.
    """
    adapters = []
    for done, path in enumerate(paths, 1):
        adapter = read_foreign(CheckpointFolder(path), model)
        adapters.append(adapter if model is None else check_modules(adapter, model))
        report("read", done, len(paths), path.name)
    shapes = _shapes(adapters)
    names = in_model_order(shapes) if model is None else [n for n in model.layers if n in shapes]
    identity = None if model is None else model.identity
    found = Collection(tuple(adapters), {name: shapes[name] for name in names}, identity)
    if model is None and found.base_models:
        return Collection(found.adapters, found.shapes, BaseModelId(found.base_models[0]))
    return found


def _shapes(adapters: Sequence[ForeignAdapter]) -> dict[str, Shape]:
    found: dict[str, tuple[Shape, str]] = {}
    for adapter in adapters:
        for module, delta in adapter.modules.items():
            transposed = module in adapter.transposed
            shape = Shape(delta.out_features, delta.in_features, transposed)
            first, source = found.setdefault(module, (shape, adapter.source))
            if first != shape:
                raise BasisMismatchError(
                    f"{adapter.source}: found {module} as {_text(shape)}, expected "
                    f"{_text(first)} as in {source}; a basis is of one model"
                )
    return {module: shape for module, (shape, _) in found.items()}


def _text(shape: Shape) -> str:
    stored = ", stored as [in, out]" if shape.transposed else ""
    return f"{shape.out_features} x {shape.in_features}{stored}"


def _low_rank(delta: Delta | None) -> LowRank | None:
    """The delta with its core, where it has one, multiplied into b."""
    if delta is None:
        return None
    assert isinstance(delta, Factors)  # what all readers of folders give
    if delta.core is None:
        return LowRank(delta.b, delta.a, delta.scaling)
    core = delta.core.double()
    b = delta.b.double() * core if core.dim() == 1 else delta.b.double() @ core
    return LowRank(b, delta.a, delta.scaling)
