"""Load Hugging Face causal language models and their tokenizers, from a local folder only."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from lorasb_runtime.errors import InputError
from lorasb_runtime.storage.dtypes import parse_dtype as parse_dtype
from lorasb_runtime.storage.tensor_file import Tensors


def parse_device(name: str) -> torch.device:
    """A device by torch's name for it. Raises InputError for one that this machine does not have.

    Tried with an empty tensor: torch's CPU build knows the word "cuda" and fails at first use.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"device: found {name!r}, expected one that torch can use here ({reason})"
        ) from None
    return device


def load_causal_lm(
    folder: Path, dtype: torch.dtype | None = None, *, attention: str | None = None
) -> PreTrainedModel:
    """The model in evaluation mode, every weight frozen; `dtype` None keeps the checkpoint's.

    `attention` None is the fastest that transformers has for the model's own formula.
    Raises InputError when transformers cannot load the folder as a causal language model.
    """
    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            attn_implementation=attention or _own_attention(config),
            local_files_only=True,
            use_safetensors=True,
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: not loadable as a causal language model ({reason})") from None
    model.eval()
    model.requires_grad_(False)
    loaded: PreTrainedModel = model
    return loaded


def _own_attention(config: PretrainedConfig) -> str | None:
    """ "eager" where scores are capped, which transformers' "sdpa" leaves out without a word."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if capped else None


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's own transformers tokenizer. Raises InputError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: no usable tokenizer ({reason})") from None


def load_state(like: type[PreTrainedModel], config: PretrainedConfig, state: Tensors) -> Any:
    """A float32 model of tensors under a checkpoint's names, which it may keep as its own.

    like, config: a model's that was loaded from a folder of the same architecture.
    """
    disable_progress_bar()
    config = copy.deepcopy(config)
    config.dtype = torch.float32
    model = like.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=torch.float32,
        attn_implementation=_own_attention(config),
    )
    model.eval()
    model.requires_grad_(False)
    return model
