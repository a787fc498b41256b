"""What modules are given in a pass, and which linear layers (q, k and v; gate and up) share it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Call:
    """What a module was given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def watch_calls(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Call]]:
    """What each of these modules was given in the forward pass that runs inside the `with`.

    One that did not run or ran more than once is left out.
    """
    seen: dict[str, Call] = {}
    twice: set[str] = set()
    handles = []
    for name in names:

        def look(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            twice.update({name} & seen.keys())
            seen[name] = Call(args, kwargs)

        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for name in twice:
            del seen[name]


def inputs_of(calls: Mapping[str, Call]) -> dict[str, torch.Tensor]:
    """The tensors that modules were given; one that was given it by keyword is left out."""
    return {name: call.args[0] for name, call in calls.items() if call.args}


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
