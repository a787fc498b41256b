"""What is exported: an adapter on its basis, module by module, scaled and rounded once."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

import lorasb_runtime
from lorasb_runtime.errors import InputError
from lorasb_runtime.importing.output import check_output_file
from lorasb_runtime.ops.core_matmul import scale_core
from lorasb_runtime.ops.rounding import round_once
from lorasb_runtime.storage import atomic
from lorasb_runtime.storage.adapter_file import Adapter
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.shard_writer import TensorSpec, tensor_bytes, write_tensors
from lorasb_runtime.storage.tensor_file import dump_json


@dataclass(frozen=True)
class Export:
    """base_model: what the output names as its base model. keep_ranks: see the PEFT exporter."""

    adapter: Adapter
    basis: Basis
    base_model: str | None = None
    dtype: torch.dtype = torch.float32
    keep_ranks: bool = False

    def scaled_core(self, index: int) -> torch.Tensor:
        """scaling * R of target `index`, [r, r] in float64."""
        core = self.basis.core(self.adapter.cores, index)
        return scale_core(core.double(), self.basis.scaling)

    def rounded(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Rounded once to the dtype. Raises InputError where that leaves its range."""
        rounded = round_once(tensor, self.dtype)
        if not torch.isfinite(rounded).all():
            dtype = str(self.dtype).removeprefix("torch.")
            raise InputError(f"{name}: found numbers that do not fit {dtype}, expected a wider one")
        return rounded

    def metadata(self) -> dict[str, str]:
        """Where the numbers came from, for the header of the file."""
        values = {
            "format": "pt",  # what readers of safetensors look for
            "lorasb.adapter": self.adapter.version,
            "lorasb.basis": self.basis.digest,
            "lorasb.name": self.adapter.name,
            "lorasb.version": lorasb_runtime.__version__,
        }
        if self.basis.base_model is not None:
            values["lorasb.base_model"] = dump_json(self.basis.base_model.as_json())
        return values

    def write_tensors(
        self,
        file: BinaryIO,
        shapes: Mapping[str, tuple[int, ...]],
        tensors: Iterator[torch.Tensor],
    ) -> None:
        """Write a safetensors file of these shapes; memory holds one tensor at a time."""
        layout = {name: TensorSpec.of(shape, self.dtype) for name, shape in shapes.items()}
        rounded = (
            tensor_bytes(self.rounded(tensor, name))
            for name, tensor in zip(shapes, tensors, strict=True)
        )
        write_tensors(file, layout, self.metadata(), rounded)

    def write_file(
        self,
        output: Path,
        shapes: Mapping[str, tuple[int, ...]],
        tensors: Iterator[torch.Tensor],
        force: bool,
    ) -> None:
        """The same into a file of its own, whole or not at all."""
        check_output_file(output, force=force)
        with atomic.new_file(output) as file:
            self.write_tensors(file, shapes, tensors)
