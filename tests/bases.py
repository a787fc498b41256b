"""Random bases and strong random adapters for tests, and the float64 reference on the side."""

from collections.abc import Sequence
from pathlib import Path

import torch

from lorasb_runtime.models.load import load_causal_lm
from lorasb_runtime.models.locate import identify
from lorasb_runtime.models.targets import find_targets, weight_of
from lorasb_runtime.storage.adapter_file import Adapter, parse_adapter, serialize_adapter
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.checkpoint import open_checkpoint
from lorasb_runtime.types import BaseModelId, TargetModule


def random_basis(
    folder: Path, rank: int = 4, *, scaling: float = 1.0, seed: int = 0, pattern: str | None = None
) -> Basis:
    """Orthonormal random B and A for every target of the model in `folder`."""
    targets = find_targets(load_causal_lm(folder), rank, pattern)
    identity = identify(str(folder), open_checkpoint(folder))
    return basis_for(targets, identity, scaling=scaling, seed=seed)


def basis_for(
    targets: Sequence[TargetModule],
    base_model: BaseModelId | None = None,
    *,
    scaling: float = 1.0,
    seed: int = 0,
) -> Basis:
    """Orthonormal random B and A for these targets."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for t in targets:
        a = torch.randn(t.in_features, t.rank, generator=generator)
        b = torch.randn(t.out_features, t.rank, generator=generator)
        tensors[f"{t.module}.A"] = torch.linalg.qr(a).Q.t().contiguous()
        tensors[f"{t.module}.B"] = torch.linalg.qr(b).Q.contiguous()
    return Basis(tuple(targets), tensors, "lora-sb", scaling, base_model)


def random_adapter(basis: Basis, seed: int, strength: float = 1.0, name: str = "") -> Adapter:
    """Cores of normal noise, strong enough to change what the model says."""
    generator = torch.Generator().manual_seed(1000 + seed)
    cores = strength * torch.randn(basis.size, generator=generator)
    adapter = Adapter(cores, basis.digest, name or f"a{seed}", basis.base_model)
    return parse_adapter(serialize_adapter(adapter), "test adapter")


def reference_logits(
    folder: Path,
    basis: Basis,
    adapter: Adapter | None,
    tokens: list[int],
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Logits [tokens, vocab] of W0 + scaling * B @ R @ A, by the model's own eager attention."""
    model = load_causal_lm(folder, dtype, attention="eager")
    model.set_experts_implementation("eager")
    if adapter is not None:
        for index, target in enumerate(basis.targets):
            core = basis.core(adapter.cores, index).double()
            b, a = basis.b(target.module).double(), basis.a(target.module).double()
            weight = weight_of(model.get_submodule(target.module))
            weight.copy_(weight.double() + basis.scaling * (b @ core @ a))
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits
