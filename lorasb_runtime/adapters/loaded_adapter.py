"""What a request carries of its adapter."""

from dataclasses import dataclass

import torch

from lorasb_runtime.adapters.names import AdapterName


@dataclass(frozen=True)
class LoadedAdapter:
    """One version, ready for a slot.

    cores: [D] as the version's file has them, or a blend's sum in float64; scaled and rounded when
    they come into a slot. version: what tells them from all others.
    """

    name: AdapterName
    version: str
    cores: torch.Tensor
