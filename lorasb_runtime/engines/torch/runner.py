"""Owns device and model, and runs one scheduled step: tokens in, logits of the last ones out."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lorasb_runtime.adapters.slots import BASE_SLOT, SlotTable
from lorasb_runtime.engines.torch.core_rows import CoreRows, adapt_for_slots
from lorasb_runtime.engines.torch.decode_graphs import DecodeGraphs, Run, cuda_graph
from lorasb_runtime.engines.torch.kv_batch import build_kv_batch
from lorasb_runtime.engines.torch.kv_cache import KVCache
from lorasb_runtime.engines.torch.prepare import shared_inputs
from lorasb_runtime.engines.torch.scheduler import Chunk, Step
from lorasb_runtime.engines.torch.sequence import Sequence
from lorasb_runtime.models.adapted_linear import check_targets
from lorasb_runtime.storage.basis_file import Basis


@dataclass(frozen=True)
class StepLogits:
    """What a step computed, in float32.

    logits: [n, vocab], row i for receivers[i], who gets a token. prompts: chunks whose sequences
    ask for log-probabilities of the prompt, with logits [count, vocab].
    """

    receivers: list[Sequence]
    logits: torch.Tensor
    prompts: list[tuple[Chunk, torch.Tensor]]


class ModelRunner:
    """Runs steps on one model with one slot table and one KV cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        basis: Basis | None,
        slots: SlotTable | None,
        cache: KVCache,
        record: Callable[[Run], Run] | None = None,
    ) -> None:
        """record: of `DecodeGraphs`; CUDA's own by default on such a device, none on others."""
        self.device = model.device
        self._model = model
        self._cache = cache
        self._cores: CoreRows | None = None
        self._head_adapted = False
        if basis is not None and slots is not None:
            check_targets(model, basis)
            head = model.get_output_embeddings()
            self._head_adapted = any(model.get_submodule(t.module) is head for t in basis.targets)
            self._cores = adapt_for_slots(model, basis, slots, shared_inputs(model, basis))
        if record is None and self.device.type == "cuda":
            record = cuda_graph
        self._graphs = record and DecodeGraphs(model, cache, self._cores, record)

    @torch.inference_mode()
    def run(self, step: Step) -> "StepLogits":
        """Compute the step: logits of those who get a token, and of prompts that are asked for."""
        self._cache.prepare(step)
        recorded = self._graphs.run(step) if self._graphs else None
        if recorded is not None:
            return StepLogits(list(step.decodes), recorded.float(), [])
        step.prefills.sort(key=self._place)
        kv_batch = build_kv_batch(self._cache, step, self.device)
        ids = [s.tokens[s.computed - 1] for s in step.decodes]
        positions = [s.computed - 1 for s in step.decodes]
        keep = list(range(len(ids)))
        runs: list[tuple[int, int, int]] = []
        receivers = list(step.decodes)
        prompts: list[tuple[Chunk, int]] = []
        for chunk in step.prefills:
            begin, end = len(ids), len(ids) + chunk.count
            runs.append((chunk.sequence.slot or BASE_SLOT, begin, end))
            ids.extend(chunk.sequence.tokens[chunk.start : chunk.start + chunk.count])
            positions.extend(range(chunk.start, chunk.start + chunk.count))
            if chunk.last:
                keep.append(end - 1)
                receivers.append(chunk.sequence)
            if chunk.sequence.wants_prompt:
                prompts.append((chunk, begin))
        for chunk, begin in prompts:
            keep.extend(range(begin, begin + chunk.count))
        if self._cores is not None:
            self._cores.prepare([s.slot or BASE_SLOT for s in step.decodes], runs)
        kept = torch.tensor(keep, dtype=torch.int64, device=self.device)
        logits = self._model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            logits_to_keep=0 if self._head_adapted else kept,  # an adapted layer sees all rows
            use_cache=False,
            kv_batch=kv_batch,
        ).logits[0]
        wanted = (logits[kept] if self._head_adapted else logits).float()
        own, *parts = wanted.split([len(receivers), *(chunk.count for chunk, _ in prompts)])
        return StepLogits(
            receivers, own, [(c, part) for (c, _), part in zip(prompts, parts, strict=True)]
        )

    def _place(self, chunk: Chunk) -> tuple[bool, bool]:
        """Of a chunk among others: those that are split come first, among equals the adapted."""
        split = self._cores is not None and self._cores.splits(chunk.count)
        return not split, chunk.sequence.slot in (None, BASE_SLOT)
