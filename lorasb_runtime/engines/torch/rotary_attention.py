"""Attention layers with rotary embeddings, which one CPU kernel turns.

One takes the place of a transformers' layer where that has been seen to ask the same of `Attends`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lorasb_runtime.engines.torch.kv_batch import Attends, LayerCall
from lorasb_runtime.models.fused_layers import about_equal
from lorasb_runtime.models.shared_inputs import Call
from lorasb_runtime.ops.rows_cpu import RowKernels

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
NORMS = {"q_norm", "k_norm"}


class RotaryAttention(nn.Module):
    """o(attend(rotate(q(x)), rotate(k(x)), v(x))), its layers under the names that they had.

    Queries and keys may be normalised, head by head, before they turn.
    """

    def __init__(self, base: Any, call: LayerCall, kernels: RowKernels) -> None:
        """base: a layer with PROJECTIONS, and both NORMS or none. call: what it asks for."""
        super().__init__()
        self.q_proj, self.k_proj = base.q_proj, base.k_proj
        self.v_proj, self.o_proj = base.v_proj, base.o_proj
        self.q_norm, self.k_norm = getattr(base, "q_norm", None), getattr(base, "k_norm", None)
        self._head_dim = int(base.head_dim)
        self._call = call
        self._kernels = kernels

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        *,
        kv_batch: Attends,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """[1, tokens, hidden] -> same shape; other arguments are what the model passes along."""
        assert attention_mask is None
        shape = hidden_states.shape[1], -1, self._head_dim
        q = self.q_proj(hidden_states)[0].view(shape)
        k = self.k_proj(hidden_states)[0].view(shape)
        v = self.v_proj(hidden_states)[0].view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = position_embeddings
        self._kernels.rotate(q, k, cos[0], sin[0])
        return self.o_proj(kv_batch.attend(q, k, v, self._call).flatten(1)[None]), None


def rotary_layers(model: PreTrainedModel) -> list[str]:
    """Names of the attention layers that a `RotaryAttention` might take the place of."""
    names = []
    for name, module in model.named_modules():
        children = {child for child, _ in module.named_children()}
        if children in (PROJECTIONS, PROJECTIONS | NORMS) and hasattr(module, "head_dim"):
            names.append(name)
    return names


def fuse_attention(
    model: PreTrainedModel, names: list[str], calls: Mapping[str, Call], kernels: RowKernels
) -> None:
    """Replace those of these layers whose replacement asks and gives the same.

    calls: what the layers were given. The model's attention function is `Attends` already.
    """
    for name in names:
        if name not in calls:
            continue
        layer = model.get_submodule(name)
        recorder = _Recorder()
        expected = _answer(layer, recorder, calls[name])
        if len(recorder.asked) != 1 or recorder.call is None:
            continue
        fused = RotaryAttention(layer, recorder.call, kernels)
        again = _Recorder()
        try:
            found = _answer(fused, again, calls[name])
        except (AssertionError, KeyError, RuntimeError, TypeError):
            continue  # it takes other arguments, or turns another part of a head
        pairs = [(found, expected), *zip(again.asked[0], recorder.asked[0], strict=True)]
        if all(about_equal(*pair) for pair in pairs):
            model.set_submodule(name, fused)


class _Recorder:
    """Notes what it is asked, and answers with it."""

    def __init__(self) -> None:
        self.call: LayerCall | None = None
        self.asked: list[tuple[torch.Tensor, ...]] = []

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        self.call = call
        self.asked.append((q.clone(), k.clone(), v.clone()))
        return q.clone()


def _answer(layer: nn.Module, recorder: _Recorder, call: Call) -> torch.Tensor:
    given = {**call.kwargs, "attention_mask": None, "kv_batch": recorder}
    answer: torch.Tensor = layer(*call.args, **given)[0]
    return answer
