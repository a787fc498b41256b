"""Writes a model folder made from another one: shards, index and small files, or nothing at all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasb_runtime.merging import folder_files
from lorasb_runtime.merging.plan import Piece, ShardPlan
from lorasb_runtime.merging.shard_merge import Found, ShardMerge
from lorasb_runtime.storage import atomic
from lorasb_runtime.storage.checkpoint import Checkpoint
from lorasb_runtime.types import Report


@dataclass(frozen=True)
class NewModel:
    """The folder to write.

    phase: what reports call it. renamed: small files that get other names, None for those left
    out. more_bytes: what comes beside tensors and small files, at most.
    """

    source: Checkpoint
    plans: list[ShardPlan]
    output: Path
    force: bool
    report: Report
    phase: str
    renamed: Mapping[str, str | None]
    more_bytes: int = 0


def write_model(
    new: NewModel,
    merge: ShardMerge[Found],
    metadata: Callable[[ShardPlan], Mapping[str, str]],
    finish: Callable[[Path], None],
) -> None:
    """Write all of it. metadata: of a shard's header.

    `finish` writes what is left, the config last of all: without one no folder is a model, which
    is so while the rest is being written. Raises ConflictError for an output that is in the way,
    TooLargeError for a disk too full.
    """
    total = sum(piece.nbytes for plan in new.plans for piece in plan.pieces)
    folder_files.check_output(
        new.source.folder, new.output, total + new.more_bytes, force=new.force
    )
    done = 0

    def tell(piece: Piece) -> None:
        nonlocal done
        done += piece.nbytes
        new.report(new.phase, done, total, piece.name)

    with atomic.new_folder(new.output, force=new.force) as folder:
        folder_files.copy_small_files(new.source.folder, folder, new.renamed)
        merge.write(new.plans, folder, metadata, tell)
        folder_files.write_index(new.source, new.plans, folder)
        finish(folder)
