"""Puts the engine's parts together from a model folder, a basis and the configuration."""

import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.slots import SlotTable
from lorasb_runtime.config import EngineConfig
from lorasb_runtime.engines.base import EngineInfo
from lorasb_runtime.engines.torch.engine import TorchEngine
from lorasb_runtime.engines.torch.kv_cache import KVCache
from lorasb_runtime.engines.torch.kv_regions import KVRegions
from lorasb_runtime.engines.torch.prefix_cache import PrefixCache
from lorasb_runtime.engines.torch.prepare import kv_shape, load_model
from lorasb_runtime.engines.torch.runner import ModelRunner
from lorasb_runtime.errors import InputError
from lorasb_runtime.models.load import load_tokenizer, parse_device, parse_dtype
from lorasb_runtime.models.reach import context_length
from lorasb_runtime.models.text import TextCodec
from lorasb_runtime.storage.basis_file import Basis

logger = logging.getLogger(__name__)


def load_engine(folder: Path, basis: Basis | None, config: EngineConfig) -> TorchEngine:
    """Load the model and build an engine that has yet to be started.

    Raises InputError for a model or configuration that cannot be served.
    """
    dtype = parse_dtype(config.dtype) if config.dtype else None
    model = load_model(folder, dtype, parse_device(config.device))
    return build_engine(model, TextCodec(load_tokenizer(folder)), basis, config)


def build_engine(
    model: PreTrainedModel, codec: TextCodec, basis: Basis | None, config: EngineConfig
) -> TorchEngine:
    """An engine around a model that `load_model` has prepared."""
    shape = kv_shape(model)
    longest, budget = _lengths(model, shape.token_bytes(model.dtype), config)
    regions = KVRegions(
        budget,
        min(config.cache.smallest_region, longest),
        longest,
        config.scheduler.max_num_seqs,
    )
    block = config.cache.prefix_block
    kept = config.cache.prefix_nbytes // (shape.token_bytes(model.dtype) * block)
    cache = KVCache(shape, regions, model.dtype, model.device, (kept, block))
    stored = model.config.dtype
    assert isinstance(stored, torch.dtype)
    slots = None
    if basis is not None:
        pins = frozenset(parse_name(name) for name in config.pins)
        slots = SlotTable(config.slots, basis.size, stored, model.device, basis.scaling, pins)
    info = EngineInfo(
        max_model_len=longest,
        vocab_size=int(model.config.get_text_config().vocab_size),
        dtype=str(model.dtype).removeprefix("torch."),
        core_dtype=str(stored).removeprefix("torch."),
        max_num_seqs=config.scheduler.max_num_seqs,
    )
    return TorchEngine(
        ModelRunner(model, basis, slots, cache),
        codec,
        info,
        regions,
        slots,
        end_tokens(model, codec),
        config.scheduler,
        PrefixCache(kept, block) if kept else None,
    )


def end_tokens(model: PreTrainedModel, codec: TextCodec) -> frozenset[int]:
    """The tokens that end a sequence: the generation config's and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    tokens = configured if isinstance(configured, list) else [configured]
    return frozenset(t for t in (*tokens, codec.eos_token_id) if t is not None)


def _lengths(model: PreTrainedModel, token_bytes: int, config: EngineConfig) -> tuple[int, int]:
    """Context length and KV budget, both in tokens."""
    budget = config.cache.nbytes // token_bytes
    own = context_length(model.config)
    longest = config.max_model_len or min(own, budget)
    if longest > own:
        raise InputError(f"max-model-len: found {longest}, expected at most the model's {own}")
    if not 0 < longest <= budget:
        raise InputError(
            f"kv cache: found room for {budget} tokens ({token_bytes} bytes each), expected at "
            f"least the context length {longest}; raise the cache or lower max-model-len"
        )
    if longest < own:
        logger.info("context length %d of the model's %d", longest, own)
    return longest, budget
