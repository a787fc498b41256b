"""Drives the real runner and scheduler by hand, for tests that want the logits of every step."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lorasb_runtime.adapters.slots import BASE_SLOT, SlotTable
from lorasb_runtime.config import SchedulerConfig
from lorasb_runtime.engines.base import SamplingParams
from lorasb_runtime.engines.torch.decode_graphs import Run
from lorasb_runtime.engines.torch.kv_cache import KVCache
from lorasb_runtime.engines.torch.kv_regions import KVRegions
from lorasb_runtime.engines.torch.prepare import kv_shape, load_model
from lorasb_runtime.engines.torch.runner import ModelRunner
from lorasb_runtime.engines.torch.scheduler import Scheduler
from lorasb_runtime.engines.torch.sequence import Sequence
from lorasb_runtime.storage.adapter_file import Adapter
from lorasb_runtime.storage.basis_file import Basis

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Driven:
    """All tokens of a sequence, and the logits [steps, vocab] from its prompt's last one on."""

    tokens: list[int]
    start: int
    logits: torch.Tensor

    def error(self, reference: torch.Tensor) -> float:
        """Largest difference from a reference [tokens, vocab], as a share of its largest logit."""
        expected = reference[self.start :][: len(self.logits)]
        return float((self.logits - expected).abs().max() / expected.abs().max())


def drive(
    folder: Path,
    basis: Basis,
    prompts: list[list[int]],
    owners: list[Adapter | None],
    *,
    steps: int,
    dtype: torch.dtype = torch.float32,
    record: Callable[[Run], Run] | None = None,
) -> list[Driven]:
    """Prefill in chunks of at most 40 tokens, then decode random tokens, all in one batch."""
    model = load_model(folder, dtype, CPU)
    regions = KVRegions(2048, 16, 256, 8)
    slots = SlotTable(8, basis.size, dtype, CPU, basis.scaling)
    cache = KVCache(kv_shape(model), regions, model.dtype, CPU)
    runner = ModelRunner(model, basis, slots, cache, record)
    lease = {a.version: slots.lease(a.version, a.cores) for a in owners if a}
    sequences = [
        Sequence(str(i), 0, list(p), len(p), 99, SamplingParams(), 0) for i, p in enumerate(prompts)
    ]
    slot_of = [lease[a.version] if a else BASE_SLOT for a in owners]
    scheduler = Scheduler(
        SchedulerConfig(8, 40), regions, lambda s: slot_of[int(s.request_id)], lambda s: None
    )
    for sequence in sequences:
        scheduler.add(sequence)
    rng = random.Random(3)
    rows: list[list[torch.Tensor]] = [[] for _ in sequences]
    while min(len(r) for r in rows) < steps:
        result = runner.run(scheduler.schedule())
        for sequence, logits in zip(result.receivers, result.logits, strict=True):
            rows[int(sequence.request_id)].append(logits)
            sequence.tokens.append(rng.randrange(3, 250))
    return [
        Driven(s.tokens, s.prompt_length - 1, torch.stack(r).double())
        for s, r in zip(sequences, rows, strict=True)
    ]
