"""A merged model's source by taking the deltas out again, and how exactly that is known."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lorasb_runtime.errors import BasisMismatchError, InputError
from lorasb_runtime.merging import folder_files
from lorasb_runtime.merging.delta import DeltaOf
from lorasb_runtime.merging.plan import ShardPlan, plan_shards
from lorasb_runtime.merging.record import MergeRecord, metadata_before, source_dtypes
from lorasb_runtime.merging.restore import Restoration, restore_target
from lorasb_runtime.merging.shard_merge import ShardMerge
from lorasb_runtime.merging.source import check_shards, target_weights
from lorasb_runtime.merging.view import ModelView, ViewReader
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.merging.writing import NewModel, write_model
from lorasb_runtime.storage.adapter_file import Adapter
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.checkpoint import Checkpoint, fingerprint, open_checkpoint
from lorasb_runtime.storage.match import check_shapes
from lorasb_runtime.storage.shard_writer import DTYPES
from lorasb_runtime.types import Report


@dataclass(frozen=True)
class UnmergeReport:
    """How much of each target's weight is certain, by module name in the basis' order.

    steps: of the merged weights' dtype, within which entries lie that are not certain. matches:
    whether the result has the fingerprint that was recorded of the source; None where
    none was. A fingerprint samples three blocks of every tensor.
    """

    modules: dict[str, Restoration]
    steps: int
    matches: bool | None

    @property
    def total(self) -> Restoration:
        return sum(self.modules.values(), Restoration())


def unmerge(
    merged: Checkpoint,
    record: MergeRecord,
    basis: Basis,
    deltas: DeltaOf,
    output: Path,
    *,
    force: bool = False,
    report: Report = lambda *_: None,
) -> UnmergeReport:
    """Write `merged` without the deltas to the folder `output`, whole or not at all.

    `deltas` are those that were added. Raises InputError for a model whose weights were unpacked,
    FileFormatError, ConflictError and TooLargeError as merging does.
    """
    said = record.as_json()
    changes = said.get("changes") or {}
    if changes.get("dequantized"):
        raise InputError(
            f"{merged.folder}: found a model whose quantized weights were unpacked, expected one "
            "that subtracting can restore; go back to the model that it was made from"
        )
    check_shards(merged)
    untied = changes.get("untied")
    view = _as_before(merged, said.get("config") or merged.config, untied)
    kept = tuple(target for target in basis.targets if target.module != untied)
    check_shapes(replace(basis, targets=kept), view.checkpoint, "basis")
    dtypes = {n: DTYPES[d] for n, d in source_dtypes(merged).items() if d in DTYPES}
    plans = plan_shards(view, target_weights(view, basis, untied), dtypes)
    stochastic = changes.get("rounding") == "stochastic"
    fold = partial(restore_target, stochastic=stochastic)
    merge = ShardMerge(ViewReader(view), basis, deltas, fold)
    wanted = (said.get("base_model") or {}).get("fingerprint")
    matches: bool | None = None

    def finish(folder: Path) -> None:
        nonlocal matches
        folder_files.write_config(merged, view.checkpoint.config, folder)
        if wanted is not None:
            matches = fingerprint(open_checkpoint(folder)) == wanted

    def metadata(plan: ShardPlan) -> dict[str, str]:
        return metadata_before(merged.folder / plan.file)

    new = NewModel(merged, plans, output, force, report, "unmerge", folder_files.TO_BASE)
    write_model(new, merge, metadata, finish)
    modules = {target.module: merge.modules[target.module] for target in kept}
    return UnmergeReport(modules, 2 if stochastic else 1, matches)


def check_basis_of(record: MergeRecord, basis: Basis) -> None:
    """Raise BasisMismatchError unless the merged adapters were this basis'."""
    found = record.provenance.get("basis")
    if found != basis.digest:
        raise BasisMismatchError(
            f"basis: found {basis.digest}, expected {found}, which the model was merged with"
        )


def check_adapters(record: MergeRecord, adapters: Sequence[Adapter]) -> list[WeightedAdapter]:
    """The adapters that were merged, with the weights they had, in the record's order.

    Raises InputError unless these are they, all of them and no other.
    """
    given = {adapter.version: adapter for adapter in adapters}
    wanted = [(item["version"], item) for item in record.as_json().get("adapters") or []]
    for version, item in wanted:
        if version not in given:
            raise InputError(
                f"adapters: found none of version {version[:12]}, expected {item['name']!r}, which "
                "was merged"
            )
    for version in given.keys() - {version for version, _ in wanted}:
        raise InputError(
            f"adapter {given[version].name!r}: found version {version[:12]}, expected one of those "
            f"that were merged ({', '.join(version[:12] for version, _ in wanted)})"
        )
    return [WeightedAdapter(given[version], item["weight"]) for version, item in wanted]


def _as_before(merged: Checkpoint, config: dict[str, Any], untied: str | None) -> ModelView:
    """The tensors that the source had."""
    gone = f"{untied}.weight"
    tensors = {name: entry for name, entry in merged.tensors.items() if name != gone}
    return ModelView(replace(merged, config=config, tensors=tensors))
