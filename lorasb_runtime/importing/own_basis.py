"""The basis that a checkpoint brings along, where it is not one that others share."""

from lorasb_runtime.importing.foreign import Delta, ForeignAdapter, Report
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.types import BaseModelId, TargetModule


def own_basis(
    adapter: ForeignAdapter, base_model: BaseModelId | None, rank: int | None, report: Report
) -> Basis:
    """Orthonormal B and A for each module, made for this one delta, at scaling 1.

    Like a LoRA-SB basis: norms of cores are norms of deltas, and other adapters can be trained on
    it. The first directions matter most. rank: the most that a module is given; None for all that
    its delta has.
    """
    targets, tensors = [], {}
    for done, (module, delta) in enumerate(adapter.modules.items(), 1):
        pair = delta.pair(rank)
        transposed = module in adapter.transposed
        targets.append(describe_target(module, delta, pair.a.shape[0], transposed))
        tensors[f"{module}.A"] = pair.a
        tensors[f"{module}.B"] = pair.b
        report("svd", done, len(adapter.modules), module)
    info = {"importer": adapter.format, "orthonormalised": True}
    return Basis(tuple(targets), tensors, "imported", 1.0, base_model, info)


def describe_target(module: str, delta: Delta, rank: int, transposed: bool) -> TargetModule:
    return TargetModule(module, rank, delta.in_features, delta.out_features, transposed)
