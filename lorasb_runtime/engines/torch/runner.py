"""Owns device and model, and runs one scheduled step: tokens in, logits of the last ones out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from lorasb_runtime.adapters.slots import BASE_SLOT, SlotTable
from lorasb_runtime.engines.base import SamplingParams
from lorasb_runtime.engines.torch.kv_batch import KVBatch, LayerCall, build_kv_batch
from lorasb_runtime.engines.torch.kv_cache import KVCache, KVShape
from lorasb_runtime.engines.torch.kv_regions import KVRegions, Region
from lorasb_runtime.engines.torch.scheduler import Chunk, Step
from lorasb_runtime.engines.torch.sequence import Sequence
from lorasb_runtime.errors import InputError
from lorasb_runtime.models.adapted_linear import adapt_model, use_dense
from lorasb_runtime.models.load import load_causal_lm
from lorasb_runtime.ops.core_matmul import SlotRows, apply_cores
from lorasb_runtime.storage.basis_file import Basis

ATTENTION = "lorasb"
PROBE_TOKENS = 24  # length of the prompt on which our attention is checked against the model's own


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kv_batch: KVBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention-function signature: [1, heads, tokens, d] -> [1, tokens, heads, d].

    Other keyword arguments are what the model passes along; `check_attention` catches at load a
    model whose result would depend on them.
    """
    call = LayerCall(
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return kv_batch.attend(query, key, value, call).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)


@dataclass
class BatchRows:
    """The rows of the step that is running, shared by all adapted layers of one runner."""

    rows: SlotRows


class SlotCores:
    """A target's view of the slot table: [slots, r, r]; multiplies each row by its slot's core."""

    def __init__(self, cores: torch.Tensor, batch: BatchRows) -> None:
        self._cores = cores
        self._batch = batch

    @property
    def active(self) -> bool:
        return self._batch.rows.any_adapter

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        flat = h.reshape(-1, h.shape[-1])
        return apply_cores(flat, self._cores, self._batch.rows).view(h.shape)


def load_model(folder: Path, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """The base model on its device, attention routed through the KV cache.

    Raises InputError, naming the architecture, when its answers would not be the model's own.
    """
    model = load_causal_lm(folder, dtype)
    model.to(device)  # type: ignore[arg-type]
    check_attention(model)
    use_dense(model)
    return model


@torch.inference_mode()
def check_attention(model: PreTrainedModel) -> None:
    """Switch the model to our attention, having compared it with its own on a short prompt.

    A model that needs what our attention does not have (attention sinks, ALiBi, a recurrent
    state) gives other logits and is refused by name.
    """
    name = type(model).__name__
    vocab = int(model.config.get_text_config().vocab_size)
    tokens = torch.arange(PROBE_TOKENS, device=model.device)[None] * 37 % vocab
    expected = model(input_ids=tokens, use_cache=False).logits[0].float()
    try:
        model.set_attn_implementation(ATTENTION)
        shape = kv_shape(model)
        regions = KVRegions(PROBE_TOKENS, PROBE_TOKENS, PROBE_TOKENS, 1)
        cache = KVCache(shape, regions, model.dtype, model.device)
        region = regions.allocate(PROBE_TOKENS)
        assert region is not None
        cache.prepare([])
        found = [_probe(model, cache, region, tokens, 0, 16)]
        for position in range(16, PROBE_TOKENS):
            found.append(_probe(model, cache, region, tokens, position, position + 1))
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name}: architecture not supported by the torch engine ({reason})"
        ) from None
    off = (torch.cat(found) - expected).abs().max().item()
    allowed = expected.abs().max().item() * (1e-3 if model.dtype == torch.float32 else 0.1)
    if not off <= allowed:
        raise InputError(
            f"{name}: architecture not supported by the torch engine "
            f"(found logits off by {off:.3g}, expected at most {allowed:.3g})"
        )


def _probe(
    model: PreTrainedModel,
    cache: KVCache,
    region: Region,
    tokens: torch.Tensor,
    start: int,
    end: int,
) -> torch.Tensor:
    """Logits [end - start, vocab] of a piece of the probe prompt: a chunk, or one decode step."""
    ids = tokens[0, :end].tolist()
    sequence = Sequence("probe", 0, ids, end, end, SamplingParams(), 0, computed=end)
    sequence.region = region
    if end - start == 1:
        step = Step(decodes=[sequence])
    else:
        step = Step(prefills=[Chunk(sequence, start, end - start, True)])
    logits: torch.Tensor = model(
        input_ids=tokens[:, start:end],
        position_ids=torch.arange(start, end, device=model.device)[None],
        use_cache=False,
        kv_batch=build_kv_batch(cache, step, model.device),
    ).logits
    return logits[0].float()


def kv_shape(model: PreTrainedModel) -> KVShape:
    """Layers, KV heads and head width from the model's configuration."""
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return KVShape(int(config.num_hidden_layers), int(kv_heads), int(head_dim))


class ModelRunner:
    """Runs steps on one model with one slot table and one KV cache."""

    def __init__(
        self, model: PreTrainedModel, basis: Basis | None, slots: SlotTable | None, cache: KVCache
    ) -> None:
        self.device = model.device
        self._model = model
        self._cache = cache
        self._batch = BatchRows(SlotRows(torch.zeros(0, dtype=torch.int64), (), False))
        if basis is not None and slots is not None:
            adapt_model(model, basis, lambda i: self._slot_cores(basis, slots, i))

    def _slot_cores(self, basis: Basis, slots: SlotTable, index: int) -> SlotCores:
        rank = basis.targets[index].rank
        span = slots.cores[:, basis.offsets[index] : basis.offsets[index + 1]]
        return SlotCores(span.view(-1, rank, rank), self._batch)

    @torch.inference_mode()
    def run(self, step: Step) -> tuple[list[Sequence], torch.Tensor]:
        """Compute the step; returns who gets a token, and their logits [n, vocab] in float32."""
        self._cache.prepare(step.moves)
        kv_batch = build_kv_batch(self._cache, step, self.device)
        ids = [s.tokens[s.computed - 1] for s in step.decodes]
        positions = [s.computed - 1 for s in step.decodes]
        keep = list(range(len(ids)))
        runs: list[tuple[int, int, int]] = []
        receivers = list(step.decodes)
        for chunk in step.prefills:
            end = chunk.start + chunk.count
            runs.append((chunk.sequence.slot or BASE_SLOT, len(ids), len(ids) + chunk.count))
            ids.extend(chunk.sequence.tokens[chunk.start : end])
            positions.extend(range(chunk.start, end))
            if chunk.last:
                keep.append(len(ids) - 1)
                receivers.append(chunk.sequence)
        slots = [s.slot or BASE_SLOT for s in step.decodes]
        any_adapter = any(slots) or any(slot for slot, _, _ in runs)
        gathered = torch.tensor(slots, dtype=torch.int64, device=self.device)
        self._batch.rows = SlotRows(gathered, tuple(runs), any_adapter)
        logits = self._model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            logits_to_keep=torch.tensor(keep, dtype=torch.int64, device=self.device),
            use_cache=False,
            kv_batch=kv_batch,
        ).logits
        return receivers, logits[0].float()
