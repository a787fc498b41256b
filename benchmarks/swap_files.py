"""Random files for a model: a basis, adapters, and many versions of them."""

from pathlib import Path

import torch

from lorasb_runtime.engines.torch.bench import random_basis
from lorasb_runtime.models.load import load_causal_lm
from lorasb_runtime.storage.adapter_file import Adapter, serialize_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis

_SERIAL = "serial-of-the-file"  # in its header, where each version has a number as long


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


class Versions:
    """Files of one adapter's cores, each a version of its own; making one costs next to nothing."""

    def __init__(self, basis: Basis, cores: torch.Tensor) -> None:
        self._file = serialize_adapter(Adapter(cores, basis.digest, info={"serial": _SERIAL}))

    def file(self, serial: int) -> bytes:
        return self._file.replace(_SERIAL.encode(), f"{serial:0{len(_SERIAL)}}".encode(), 1)
