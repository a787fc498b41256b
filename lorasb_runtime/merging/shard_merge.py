"""Makes the pieces of merged shards, several at once; a worker holds blocks, never a tensor."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.merging.delta import Delta, DeltaOf
from lorasb_runtime.merging.fold import Put, Rows, adding_dtype, row_blocks
from lorasb_runtime.merging.plan import Piece, ShardPlan
from lorasb_runtime.merging.view import ViewReader
from lorasb_runtime.ops.threads import one_thread
from lorasb_runtime.storage import atomic
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.shard_writer import DTYPES, NewShard, tensor_bytes
from lorasb_runtime.types import TargetModule

MOST_WORKERS = 8  # by default: more would wait for the disk
FLUSH_BYTES = 512 << 20  # written between two flushes, so that little is left for the end

Found = TypeVar("Found")
# Makes a target's weight of the stored one and the delta, hands its rows to the fourth argument,
# and says what became of the delta.
FoldTarget = Callable[[Rows, Delta, torch.dtype, Put, TargetModule], Found]


class ShardMerge(Generic[Found]):
    """Writes one shard after the other; `modules` has what the fold found, by module name."""

    def __init__(
        self,
        reader: ViewReader,
        basis: Basis,
        deltas: DeltaOf,
        fold: FoldTarget[Found],
        workers: int | None = None,
    ) -> None:
        self.modules: dict[str, Found] = {}
        self._reader = reader
        self._basis = basis
        self._deltas = deltas
        self._fold = fold
        self._workers = workers or min(MOST_WORKERS, torch.get_num_threads())

    def write(
        self,
        plans: list[ShardPlan],
        folder: Path,
        metadata: Callable[[ShardPlan], Mapping[str, str]],
        report: Callable[[Piece], None],
    ) -> None:
        """Write the shards into `folder`. `report` is told of each piece that is done."""
        with (
            one_thread(),
            ThreadPoolExecutor(self._workers, "lorasb-merge") as pool,
            Flusher() as flusher,
        ):
            for plan in plans:
                path = folder / plan.file
                with NewShard(path, plan.layout, metadata(plan)) as shard:
                    futures = [pool.submit(self._make, piece, shard) for piece in plan.pieces]
                    try:
                        for piece, future in zip(plan.pieces, futures, strict=True):
                            future.result()
                            flusher.wrote(path, piece.nbytes)
                            report(piece)
                    except BaseException:
                        pool.shutdown(cancel_futures=True)
                        raise

    def _make(self, piece: Piece, shard: NewShard) -> None:
        def put(part: slice, rows: torch.Tensor) -> None:
            row = rows.shape[1] * rows.element_size()
            shard.write(piece.name, piece.start + part.start * row, tensor_bytes(rows))

        if piece.copied:
            shard.write(piece.name, piece.start, self._reader.raw(piece.name, piece.expert))
        elif piece.nbytes:
            weight = self._reader.rows(piece.name, piece.expert)
            if piece.target is None:
                convert(weight, DTYPES[piece.dtype], put, piece.name)
            else:
                target = self._basis.targets[piece.target]
                dtype = DTYPES[piece.dtype]
                delta = self._deltas(piece.target, adding_dtype(weight.dtype, dtype))
                found = self._fold(weight, delta, dtype, put, target)
                self.modules[target.module] = found


def convert(weight: Rows, dtype: torch.dtype, put: Put, name: str) -> None:
    """Hand a tensor in another dtype to `put`. Raises InputError for numbers that do not fit it."""
    for part in row_blocks(weight.shape):
        rows = weight[part]
        converted = rows.to(dtype)
        if torch.isfinite(converted).all() < torch.isfinite(rows).all():
            raise InputError(
                f"{name}: found numbers out of range, expected those that fit "
                f"{str(dtype).removeprefix('torch.')}"
            )
        put(part, converted)


class Flusher:
    """Has the system write files to disk meanwhile."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "lorasb-flush")
        self._running: Future[None] | None = None
        self._written = 0

    def wrote(self, path: Path, nbytes: int) -> None:
        """Count what was written; now and then the file is flushed, one flush at a time."""
        self._written += nbytes
        if self._written >= FLUSH_BYTES and (self._running is None or self._running.done()):
            self._written = 0
            self._running = self._pool.submit(atomic.sync_file, path)

    def __enter__(self) -> "Flusher":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
