"""Merging into a Hugging Face checkpoint on disk, shard by shard."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.merging import folder_files
from lorasb_runtime.merging.delta import DeltaOf
from lorasb_runtime.merging.fold import NEAREST, Rounding, fold_target
from lorasb_runtime.merging.plan import ShardPlan, output_dtypes, plan_shards
from lorasb_runtime.merging.record import MergeRecord, write_card, write_report
from lorasb_runtime.merging.shard_merge import ShardMerge
from lorasb_runtime.merging.source import check_shards, target_weights
from lorasb_runtime.merging.survival import Survival
from lorasb_runtime.merging.undo import most_undo_bytes, write_undo
from lorasb_runtime.merging.view import ModelView, ViewReader, view_model
from lorasb_runtime.merging.writing import NewModel, write_model
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.checkpoint import Checkpoint, open_checkpoint
from lorasb_runtime.storage.match import check_fingerprint, check_shapes
from lorasb_runtime.types import Report


@dataclass(frozen=True)
class MergeConfig:
    """How the merged model is written.

    dtype: of every floating-point tensor; None keeps each tensor's own. rounding: of the merged
    weights; all others are rounded to the nearest. dequantize: unpack a quantized model. untie:
    give a tied output embedding a tensor of its own. reversible: also write what restores every
    byte of the source. measure_all: measure every entry, not a sample of large weights. workers:
    threads; None chooses.
    """

    dtype: torch.dtype | None = None
    rounding: Rounding = NEAREST
    dequantize: bool = False
    untie: bool = False
    reversible: bool = False
    measure_all: bool = False
    workers: int | None = None


AS_IS = MergeConfig()


@dataclass(frozen=True)
class MergeReport:
    """What became of each target's delta, by module name in the basis' order.

    narrow: the modules that were written in 16 bits.
    """

    modules: dict[str, Survival]
    narrow: frozenset[str] = field(default_factory=frozenset)

    @property
    def total(self) -> Survival:
        return sum(self.modules.values(), Survival())

    @property
    def worst_first(self) -> list[str]:
        """The modules' names, those with the largest relative error first."""
        return sorted(self.modules, key=lambda name: -self.modules[name].relative_error)


def merge_checkpoint(
    source: Checkpoint,
    basis: Basis,
    deltas: DeltaOf,
    output: Path,
    *,
    provenance: Mapping[str, str],
    config: MergeConfig = AS_IS,
    force: bool = False,
    report: Report = lambda *_: None,
    check: Callable[[Path, Report], None] | None = None,
) -> MergeReport:
    """Write `source` with the targets' deltas added to the folder `output`, whole or not at all.

    provenance: from `describe_merge`; it goes into each shard's metadata under `lorasb.` keys, into
    the model card and the report file. Sharding, index, config, tokenizer and other small files
    are kept. `check` is given the finished folder before it takes its name, and may raise.

    Raises BasisMismatchError for a basis of another model, FileFormatError for a damaged source,
    InputError for weights that no delta can be added to, ConflictError for an output that is in
    the way, TooLargeError for a disk too full.
    """
    check_shards(source)
    view = prepare(source, basis, config)
    check_fingerprint(basis, source, "basis")  # a quantized model has another than the plain one
    plans = plan_shards(view, target_weights(view, basis), output_dtypes(view, config.dtype))
    fold = partial(fold_target, rounding=config.rounding, measure_all=config.measure_all)
    merge = ShardMerge(ViewReader(view), basis, deltas, fold, config.workers)
    new_config = folder_files.new_config(view.checkpoint.config, config.dtype)
    narrow = _narrow(basis, plans)
    if config.rounding.stochastic and not narrow:
        raise InputError(
            "rounding: found stochastic for weights written in 32 bits or more, expected 16 bits"
        )
    record = MergeRecord.of(source, provenance, _changes(view, config), new_config)
    made = MergeReport({})

    def finish(folder: Path) -> None:
        nonlocal made
        modules = {target.module: merge.modules[target.module] for target in basis.targets}
        made = MergeReport(modules, narrow)
        write_report(folder, record, made.modules)
        write_card(folder, record, made.total)
        folder_files.write_config(source, new_config, folder)
        if config.reversible:
            write_undo(source, open_checkpoint(folder), folder / folder_files.UNDO, report)
        if check is not None:
            check(folder, report)

    def metadata(plan: ShardPlan) -> dict[str, str]:
        return record.metadata(source, plan)

    more = most_undo_bytes(source, plans) if config.reversible else 0
    names = folder_files.TO_MERGED
    new = NewModel(source, plans, output, force, report, "merge", names, more)
    write_model(new, merge, metadata, finish)
    return made


def prepare(source: Checkpoint, basis: Basis, config: MergeConfig) -> ModelView:
    """The model as the output will have it, its targets' shapes checked."""
    view = view_model(
        source, basis, config.dtype, dequantize=config.dequantize, untied=config.untie
    )
    check_shapes(basis, view.checkpoint, "basis")
    return view


def _narrow(basis: Basis, plans: list[ShardPlan]) -> frozenset[str]:
    """The modules whose weights are written in 16 bits."""
    pieces = [piece for plan in plans for piece in plan.pieces if piece.dtype in ("BF16", "F16")]
    return frozenset(basis.targets[p.target].module for p in pieces if p.target is not None)


def _changes(view: ModelView, config: MergeConfig) -> dict[str, object]:
    """What was done to the model besides adding the delta."""
    changes: dict[str, object] = {}
    if config.dtype is not None:
        changes["dtype"] = str(config.dtype).removeprefix("torch.")
    if config.rounding.stochastic:
        changes |= {"rounding": "stochastic", "seed": config.rounding.seed}
    if view.untied is not None:
        changes["untied"] = view.untied
    if view.packed:
        changes["dequantized"] = True
    return changes
