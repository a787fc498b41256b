"""Gradients of the target weights over some samples, each gathered in a hook of its own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from lorasb_runtime.models.targets import is_transposed
from lorasb_runtime.training.batches import answer_losses
from lorasb_runtime.training.data import Example
from lorasb_runtime.types import TargetModule


def summed_gradients(
    model: PreTrainedModel,
    targets: tuple[TargetModule, ...],
    examples: Sequence[Example],
    batch_size: int,
    report: Callable[[int, float], None],
) -> dict[str, torch.Tensor]:
    """The gradient of each target's weight, summed over the examples: float32 [out, in].

    Every example counts the same: its loss is the mean over its own answer tokens. Only target
    weights get gradients, and each is taken out of the graph's hands as soon as it is complete.
    `report` is told the examples done and the last batch's mean loss.
    """
    sums: dict[str, torch.Tensor] = {}
    modules = {t.module: model.get_submodule(t.module) for t in targets}
    with _gathering(model, modules, sums), torch.enable_grad():
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            counts = torch.tensor([e.answer_tokens for e in batch], device=model.device)
            loss = (answer_losses(model, batch) / counts).sum()
            loss.backward()
            report(start + len(batch), loss.item() / len(batch))
    return {
        name: total.t().contiguous() if is_transposed(modules[name]) else total
        for name, total in sums.items()
    }


@contextmanager
def _gathering(
    model: nn.Module, modules: dict[str, nn.Module], sums: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Let the modules' weights alone want gradients, and add each into `sums` when it is there.

    Afterwards every parameter wants a gradient or not, as it did before.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handles = []
    model.requires_grad_(False)
    for name, module in modules.items():
        weight = module.get_parameter("weight")
        sums[name] = torch.zeros_like(weight, dtype=torch.float32)
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(_taker(sums[name])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def _taker(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def take(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        total.add_(weight.grad)
        weight.grad = None

    return take
