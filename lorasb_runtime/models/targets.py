"""Which linear layers of a model may carry a delta, and how their weights lie."""

import re

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorasb_runtime.errors import InputError
from lorasb_runtime.types import TargetModule


def is_linear(module: nn.Module) -> bool:
    """Whether the layer is one that can carry a delta (`nn.Linear`, GPT-2's `Conv1D`)."""
    return isinstance(module, nn.Linear | Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """Whether the layer stores its weight as [in, out]."""
    return isinstance(module, Conv1D)


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight as [out, in], whichever way round the layer stores it."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.t() if is_transposed(module) else weight


def find_targets(
    model: PreTrainedModel, rank: int, pattern: str | None = None
) -> tuple[TargetModule, ...]:
    """Target modules in the model's own order, all of rank `rank`.

    Without `pattern` these are all linear layers but the output embedding; with it, those whose
    name the regular expression finds anywhere. Raises InputError for a bad pattern, for one that
    matches nothing (and lists what there is) or a tied output embedding, and for a rank below one
    or above what a layer allows.
    """
    if rank < 1:
        raise InputError(f"rank: found {rank}, expected at least 1")
    linear = {name: m for name, m in model.named_modules() if is_linear(m)}
    head = model.get_output_embeddings()
    if pattern is None:
        chosen = {name: m for name, m in linear.items() if m is not head}
    else:
        chosen = {name: m for name, m in linear.items() if _compile(pattern).search(name)}
    if not chosen:
        names = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in linear})
        raise InputError(
            f"targets: {pattern!r} matches none of the model's linear layers: {', '.join(names)}"
        )
    for name, module in chosen.items():
        if module is head and module.weight is model.get_input_embeddings().weight:
            raise InputError(
                f"targets: {pattern!r} matches {name}, whose weight is the input embedding's too "
                "(tied embeddings); expected layers with a weight of their own"
            )
    return tuple(_describe(name, module, rank) for name, module in chosen.items())


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"targets: {pattern!r} is no regular expression ({error})") from None


def _describe(name: str, module: nn.Module, rank: int) -> TargetModule:
    out_features, in_features = weight_of(module).shape
    if rank > min(out_features, in_features):
        raise InputError(
            f"rank: found {rank}, expected at most {min(out_features, in_features)}, "
            f"as {name} is {out_features} x {in_features}"
        )
    return TargetModule(name, rank, in_features, out_features, is_transposed(module))
