"""Decode steps as CUDA graphs, which spare the launch of each operation from Python.

A graph is recorded for each make-up of a batch: how many rows, in powers of two, of each KV size
class. `FixedStep`, what it records, is tested on CPU. NOT YET RUN ON A GPU: recording and replay.
"""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Rows
from itertools import groupby

import torch
from transformers import PreTrainedModel

from lorasb_runtime.adapters.slots import BASE_SLOT
from lorasb_runtime.engines.torch.core_rows import CoreRows
from lorasb_runtime.engines.torch.kv_batch import DecodeGroup, KVBatch, order_by_region
from lorasb_runtime.engines.torch.kv_cache import KVCache
from lorasb_runtime.engines.torch.scheduler import Step
from lorasb_runtime.engines.torch.sequence import Sequence

logger = logging.getLogger(__name__)

MOST_GRAPHS = 64  # beyond them steps run as they are

# Of each size class that has rows: which, and for how many there is room.
MakeUp = tuple[tuple[int, int], ...]
Run = Callable[[], torch.Tensor]


class FixedStep:
    """A decode step of one make-up whose tensors keep their places, whatever runs in it."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        cores: CoreRows | None,
        make_up: MakeUp,
        *,
        adapted: bool,
    ) -> None:
        """adapted: whether any row may have an adapter."""
        self._model = model
        self._cores = cores
        self._adapted = adapted
        count = sum(room for _, room in make_up)
        self._inputs = torch.zeros(4, count, dtype=torch.int64, device=model.device)
        self._rooms = [room for _, room in make_up]
        _, positions, rows, _ = self._inputs
        groups: list[DecodeGroup] = []
        for size, room in make_up:
            begin = groups[-1].end if groups else 0
            place = slice(begin, begin + room)
            groups.append(
                DecodeGroup(
                    size=size,
                    begin=begin,
                    end=begin + room,
                    rows=rows[place],
                    positions=positions[place],
                    lengths=positions[place],
                    width=cache.capacity(size),
                    lo=0,
                    hi=0,
                    gathered=True,
                )
            )
        self._groups = groups
        self._cache = cache

    def fill(self, sequences: list[Sequence]) -> list[int]:
        """Take these in, ordered by region; gives the rows that they have.

        What room is left computes a group's first sequence again.
        """
        own: list[int] = []
        columns: list[tuple[int, int, int, int]] = []
        members = [list(group) for _, group in groupby(sequences, key=_size)]
        for room, group in zip(self._rooms, members, strict=True):
            own.extend(range(len(columns), len(columns) + len(group)))
            columns.extend(map(_column, [*group, *group[:1] * (room - len(group))]))
        self._inputs.copy_(torch.tensor(columns).t())
        return own

    def run(self) -> torch.Tensor:
        """The model's forward pass: logits [rows, vocab] of all rows."""
        ids, positions, _, slots = self._inputs
        if self._cores is not None:
            self._cores.decode(slots if self._adapted else None)
        for group in self._groups:
            group.forget()
        logits: torch.Tensor = self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            kv_batch=KVBatch(self._cache, [*self._groups]),
        ).logits
        return logits[0]


def cuda_graph(run: Run) -> Run:
    """What `run` does, recorded; it must work on the same tensors whenever it runs."""
    with torch.cuda.device_of(run()):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # allocates what must not be recorded
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return recorded

    return replay


class DecodeGraphs:
    """The graphs of one runner; all anew whenever the KV cache gets other tensors."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        cores: CoreRows | None,
        record: Callable[[Run], Run],
    ) -> None:
        """record: `cuda_graph`."""
        self._model = model
        self._cache = cache
        self._cores = cores
        self._record = record
        self._graphs: dict[tuple[MakeUp, bool], tuple[FixedStep, Run]] = {}
        self._layout = cache.layout
        self._works = True

    def run(self, step: Step) -> torch.Tensor | None:
        """Logits [decodes, vocab] of a step that only decodes; None where no graph fits it.

        Orders `step.decodes` by region.
        """
        if not self._works or step.prefills:
            return None
        order_by_region(step.decodes)
        if self._layout != self._cache.layout:
            self._graphs.clear()
            self._layout = self._cache.layout
        adapted = any(sequence.slot for sequence in step.decodes)
        key = make_up_of(step.decodes), adapted
        if key not in self._graphs and not self._add(key, step.decodes):
            return None
        fixed, replay = self._graphs[key]
        own = fixed.fill(step.decodes)
        return replay()[own]

    def _add(self, key: tuple[MakeUp, bool], sequences: list[Sequence]) -> bool:
        """Record a graph, and compare what it gives with the same without it."""
        if len(self._graphs) >= MOST_GRAPHS:
            return False
        make_up, adapted = key
        fixed = FixedStep(self._model, self._cache, self._cores, make_up, adapted=adapted)
        fixed.fill(sequences)
        try:
            expected = fixed.run().float()
            if not expected.isfinite().all():  # a row's own affair, and nothing to compare with
                return False
            replay = self._record(fixed.run)
            found = replay()
            off = (found.float() - expected).abs().max().item()
            allowed = expected.abs().max().item() * 8 * torch.finfo(found.dtype).eps
            if off <= allowed:
                self._graphs[key] = fixed, replay
                return True
            reason = f"found logits off by {off:.3g}, expected at most {allowed:.3g}"
        except Exception as error:  # whatever a layer, the driver or the device raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self._works = False
        self._graphs.clear()
        logger.warning("decode steps are not recorded as CUDA graphs: %s", reason)
        return False


def make_up_of(sequences: Rows[Sequence]) -> MakeUp:
    """Of sequences ordered by region, room for each class in powers of two."""
    return tuple(
        (size, 1 << (len(list(group)) - 1).bit_length())
        for size, group in groupby(sequences, key=_size)
    )


def _size(sequence: Sequence) -> int:
    assert sequence.region is not None
    return sequence.region.size


def _column(sequence: Sequence) -> tuple[int, int, int, int]:
    """Token, its position, the cache's row and the slot."""
    assert sequence.region is not None
    last = sequence.computed - 1
    return sequence.tokens[last], last, sequence.region.row, sequence.slot or BASE_SLOT
