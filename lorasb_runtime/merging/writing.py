"""Writes a model folder made from another one: shards, index and small files, or nothing at all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasb_runtime.merging import folder_files
from lorasb_runtime.merging.plan import Piece, ShardPlan
from lorasb_runtime.merging.record import PREFIX
from lorasb_runtime.merging.shard_merge import Found, ShardMerge
from lorasb_runtime.storage import atomic, tensor_file
from lorasb_runtime.storage.checkpoint import Checkpoint

Report = Callable[[str, int, int, str], None]  # phase, bytes done, bytes in all, note


@dataclass(frozen=True)
class NewModel:
    """The folder to write. more_bytes: what comes beside tensors and small files, at most."""

    source: Checkpoint
    plans: list[ShardPlan]
    output: Path
    force: bool
    report: Report
    more_bytes: int = 0


def write_model(
    new: NewModel,
    merge: ShardMerge[Found],
    metadata: Callable[[ShardPlan], Mapping[str, str]],
    finish: Callable[[Path], None],
) -> None:
    """Write all of it. metadata: of a shard, beside its source's but for what a merge put there.

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
        new.report("merge", done, total, piece.name)

    def of_shard(plan: ShardPlan) -> dict[str, str]:
        header, _ = tensor_file.read_header(new.source.folder / plan.file)
        own = header.get("__metadata__", {"format": "pt"})
        kept = {key: value for key, value in own.items() if not key.startswith(PREFIX)}
        return {**kept, **metadata(plan)}

    with atomic.new_folder(new.output, force=new.force) as folder:
        folder_files.copy_small_files(new.source.folder, folder)
        merge.write(new.plans, folder, of_shard, tell)
        folder_files.write_index(new.source, new.plans, folder)
        finish(folder)
