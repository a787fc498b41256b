"""Loads a model and makes it ready for the runner: our attention and layers, checked."""

import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from lorasb_runtime.engines.base import SamplingParams
from lorasb_runtime.engines.torch.kv_batch import Attends, LayerCall, build_kv_batch
from lorasb_runtime.engines.torch.kv_cache import KVCache, KVShape
from lorasb_runtime.engines.torch.kv_regions import KVRegions, Region
from lorasb_runtime.engines.torch.rotary_attention import fuse_attention, rotary_layers
from lorasb_runtime.engines.torch.scheduler import Chunk, Step
from lorasb_runtime.engines.torch.sequence import Sequence
from lorasb_runtime.errors import BasisMismatchError, InputError
from lorasb_runtime.models.fused_layers import fuse_layers, fusible_layers
from lorasb_runtime.models.load import load_causal_lm
from lorasb_runtime.models.packed_linear import pack_linears, plain_linears
from lorasb_runtime.models.reach import check_windows
from lorasb_runtime.models.shared_inputs import inputs_of, neighbours_with_one_input, watch_calls
from lorasb_runtime.ops.dense import compute_dtype
from lorasb_runtime.ops.rows_cpu import row_kernels
from lorasb_runtime.storage.basis_file import Basis

logger = logging.getLogger(__name__)

ATTENTION = "lorasb"
PROBE_TOKENS = 24  # length of the prompt on which our attention is checked against the model's own
# What a model may hand its attention function that changes the result and that ours does not have.
UNSUPPORTED = ("s_aux", "position_bias")


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kv_batch: Attends,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention-function signature: [1, heads, tokens, d] -> [1, tokens, heads, d].

    Other keyword arguments are what the model passes along; `check_attention` catches at load a
    model whose result would depend on them.
    """
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"its attention needs {name}")
    if attention_mask is not None:
        raise ValueError("its attention needs a mask of its own")
    call = LayerCall(
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return kv_batch.attend(q, k, v, call)[None], None


AttentionInterface.register(ATTENTION, _attention)


def load_model(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    change: Callable[[PreTrainedModel], object] | None = None,
) -> PreTrainedModel:
    """The base model on its device, attention routed through the KV cache.

    Rounded to `dtype` (None: the checkpoint's), then held in the dtype that the device multiplies
    fastest (`compute_dtype`); `model.config.dtype` keeps the former. `change` may alter the weights
    in place before they are packed.
    Raises InputError, naming the architecture, when its answers would not be the model's own.
    """
    model = load_causal_lm(folder, dtype)
    held = compute_dtype(model.dtype, device)
    if held != model.dtype:
        logger.info("this CPU has no %s instructions: weights are held in %s", model.dtype, held)
    model.to(device=device, dtype=held)  # type: ignore[call-arg]
    if change is not None:
        change(model)
    check_attention(model)
    return model


@torch.inference_mode()
def check_attention(model: PreTrainedModel) -> None:
    """Switch the model to our attention and layers, compared with its own on a short prompt.

    A model that needs what our attention does not have (attention sinks, ALiBi, a recurrent
    state) gives other logits and is refused by name. What can be fused is afterwards.
    """
    name = type(model).__name__
    tokens = _probe_tokens(model)
    windows: dict[int, int | None] = {}
    try:
        linears = plain_linears(model)
        kernels = row_kernels(model.dtype, model.device)
        fusible = fusible_layers(model) if kernels else []
        rotary = rotary_layers(model) if kernels else []
        with watch_calls(model, [*linears, *fusible, *rotary]) as calls:
            expected = model(input_ids=tokens, use_cache=False).logits[0].float()
        model.set_attn_implementation(ATTENTION)
        pack_linears(model, neighbours_with_one_input(linears, inputs_of(calls)))
        cache, region = _probe_cache(model)
        found = [_probe(model, cache, region, tokens, 0, 16, windows, most_pairs=0)]
        ends = [16, 19, *range(20, PROBE_TOKENS + 1)]  # some tokens at once, then one by one
        for start, end in pairwise(ends):
            found.append(_probe(model, cache, region, tokens, start, end))
        check_windows(model.config, windows)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, InputError) as error:
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
    if kernels:  # each compared with the layer that it takes the place of
        fuse_attention(model, rotary, calls, kernels)
        fuse_layers(model, fusible, calls, kernels)


def _probe_tokens(model: PreTrainedModel) -> torch.Tensor:
    vocab = int(model.config.get_text_config().vocab_size)
    return torch.arange(PROBE_TOKENS, device=model.device)[None] * 37 % vocab


def _probe_cache(model: PreTrainedModel) -> tuple[KVCache, Region]:
    regions = KVRegions(PROBE_TOKENS, PROBE_TOKENS, PROBE_TOKENS, 1)
    cache = KVCache(kv_shape(model), regions, model.dtype, model.device)
    region = regions.allocate(PROBE_TOKENS)
    assert region is not None
    cache.prepare(Step())
    return cache, region


@torch.inference_mode()
def shared_inputs(model: PreTrainedModel, basis: Basis) -> list[list[str]]:
    """The basis' targets in order, those together that read the same input (q, k and v).

    Raises BasisMismatchError for a target whose rows are not the batch's tokens, as an expert's.
    """
    names = [target.module for target in basis.targets]
    with watch_calls(model, names) as calls:
        _probe(model, *_probe_cache(model), _probe_tokens(model), 0, PROBE_TOKENS)
    inputs = inputs_of(calls)
    for name in names:
        rows = inputs[name].shape[:-1].numel() if name in inputs else None
        if rows != PROBE_TOKENS:
            raise BasisMismatchError(
                f"{name}: found a layer that not all tokens pass (an expert's?), "
                "expected one that each passes once"
            )
    return neighbours_with_one_input(names, inputs)


def _probe(
    model: PreTrainedModel,
    cache: KVCache,
    region: Region,
    tokens: torch.Tensor,
    start: int,
    end: int,
    windows: dict[int, int | None] | None = None,
    most_pairs: int | None = None,
) -> torch.Tensor:
    """Logits [end - start, vocab] of a piece of the probe prompt: a chunk, or one decode step.

    Notes in `windows` what window each layer asked for. Has the logits given in reverse, so that
    a model that gives others than it is asked for is found out. most_pairs: as `build_kv_batch`'s.
    """
    ids = tokens[0, :end].tolist()
    sequence = Sequence("probe", 0, ids, end, end, SamplingParams(), 0, computed=end)
    sequence.region = region
    if end - start == 1:
        step = Step(decodes=[sequence])
    else:
        step = Step(prefills=[Chunk(sequence, start, end - start, True)])
    kv_batch = build_kv_batch(cache, step, model.device, most_pairs)
    positions = torch.arange(start, end, device=model.device)
    logits: torch.Tensor = model(
        input_ids=tokens[:, start:end],
        position_ids=positions[None],
        logits_to_keep=(positions - start).flip(0),
        use_cache=False,
        kv_batch=kv_batch,
    ).logits
    if windows is not None:
        windows.update(kv_batch.windows)
    return logits[0].flip(0).float()


def kv_shape(model: PreTrainedModel) -> KVShape:
    """Layers, KV heads and head width from the model's configuration."""
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return KVShape(int(config.num_hidden_layers), int(kv_heads), int(head_dim))
