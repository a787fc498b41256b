"""Finds linear layers that read one and the same tensor (q, k and v; gate and up), in a pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def watch_inputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """What each of these layers was given in the forward pass that runs inside the `with`.

    A layer that did not run, ran more than once or was given it by keyword is left out.
    """
    seen: dict[str, torch.Tensor] = {}
    twice: set[str] = set()
    handles = []
    for name in names:

        def look(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
            twice.update({name} & seen.keys())
            if inputs:
                seen[name] = inputs[0]

        handles.append(model.get_submodule(name).register_forward_pre_hook(look))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for name in twice:
            del seen[name]


def neighbours_with_one_input(
    names: Sequence[str], inputs: dict[str, torch.Tensor]
) -> list[list[str]]:
    """`names` cut into runs of neighbours that were given one and the same tensor."""
    runs: list[list[str]] = []
    for name in names:
        given = inputs.get(name)
        if runs and given is not None and inputs.get(runs[-1][-1]) is given:
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs
