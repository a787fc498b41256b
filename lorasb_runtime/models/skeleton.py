"""A model's linear layers, known from its configuration alone: no weight is read."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorasb_runtime.errors import InputError
from lorasb_runtime.models.targets import is_linear, is_transposed, weight_of


@dataclass(frozen=True)
class LinearLayer:
    """holder: the module whose weight this is in a checkpoint, another for a tied embedding.

    transposed: the checkpoint stores the weight as [in, out].
    """

    out_features: int
    in_features: int
    transposed: bool
    holder: str


def linear_layers(folder: Path) -> dict[str, LinearLayer]:
    """Every layer that can carry a delta by its name, in the model's own order.

    Raises InputError when transformers has no causal language model for the configuration.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: no causal language model's configuration ({reason})") from None
    names: dict[int, str] = {}
    layers = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        holder = names.setdefault(id(weight), name)
        if is_linear(module):
            out_features, in_features = weight_of(module).shape
            layers[name] = LinearLayer(out_features, in_features, is_transposed(module), holder)
    return layers
