"""Random files for a model: a basis, adapters, and many versions of them."""

from pathlib import Path

import torch

from lorasb_runtime.engines.torch.bench import random_basis
from lorasb_runtime.models.load import load_causal_lm
from lorasb_runtime.storage.adapter_file import Adapter, serialize_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis


def make_basis(model: Path, rank: int, path: Path) -> Basis:
    """A random basis for the model, also written to `path`."""
    torch.manual_seed(0)
    basis = random_basis(load_causal_lm(model), rank)
    save_basis(basis, path)
    return basis


def make_variant(basis: Basis, variant: int, strength: float) -> torch.Tensor:
    """Cores [D] of normal noise, in the dtype that adapters are usually kept in."""
    generator = torch.Generator().manual_seed(variant)
    return (strength * torch.randn(basis.size, generator=generator)).bfloat16()


def adapter_file(basis: Basis, cores: torch.Tensor, serial: int) -> bytes:
    """An adapter file; each serial makes a version of its own of the same cores."""
    return serialize_adapter(Adapter(cores, basis.digest, info={"serial": serial}))
