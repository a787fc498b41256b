"""A foreign checkpoint's folder: its JSON files and its tensors, none of which is trusted."""

import math
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lorasb_runtime.errors import FileFormatError, NotFoundError
from lorasb_runtime.storage.json_file import check_regular, read_json_object
from lorasb_runtime.storage.shard_writer import DTYPES

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class TensorFile:
    """A safetensors file, of which the header is read at once and each tensor when asked for.

    Shapes and dtypes are checked before anything is allocated: a tensor takes no more memory than
    the file has bytes for it.
    """

    def __init__(self, path: Path) -> None:
        """Raises NotFoundError, and FileFormatError for what is no whole safetensors file."""
        check_regular(path, "safetensors weights")
        self.source = str(path)
        self.names: tuple[str, ...]
        try:
            file: Any = safe_open(path, "pt")
            self._file, self.names = file, tuple(file.keys())
        except (SafetensorError, OSError) as error:
            detail = " ".join(str(error).split())[:200]
            raise FileFormatError(
                self.source, f"a file that does not parse ({detail})", "a whole safetensors file"
            ) from None

    @property
    def metadata(self) -> dict[str, str]:
        found: dict[str, str] | None = self._file.metadata()
        return found or {}

    def shape(self, name: str) -> list[int]:
        return list(self._file.get_slice(name).get_shape())

    def tensor(self, name: str, dims: int) -> torch.Tensor:
        """A float tensor of so many dimensions, none of them empty, all of its numbers finite."""
        found = self._file.get_slice(name)
        shape, dtype = self.shape(name), found.get_dtype()
        if dtype not in DTYPES or DTYPES[dtype] == torch.float64:
            raise self.wrong(f"{name} of dtype {dtype}", "F32, F16 or BF16")
        if len(shape) != dims or 0 in shape:
            raise self.wrong(f"{name} of shape {shape}", f"{dims} dimensions, none of them empty")
        tensor: torch.Tensor = self._file.get_tensor(name)
        # No mask of the tensor's size: among many small tensors it would leave holes in memory.
        if not all(math.isfinite(end.item()) for end in tensor.aminmax()):
            raise self.wrong(f"NaN or Inf in {name}", "finite numbers")
        return tensor

    def wrong(self, found: str, expected: str) -> FileFormatError:
        """The error that names this file."""
        return FileFormatError(self.source, found, expected)


class CheckpointFolder:
    """One checkpoint as some other program left it."""

    def __init__(self, path: Path) -> None:
        """Raises NotFoundError, FileFormatError where `path` is no folder."""
        if path.is_file() or path.name.endswith((".safetensors", *PICKLES)):
            raise FileFormatError(str(path), "a file", "the folder of a checkpoint")
        if not path.is_dir():
            raise NotFoundError(f"{path}: no such folder")
        self.path = path

    @property
    def source(self) -> str:
        return str(self.path)

    def has(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    @cached_property
    def peft_config(self) -> dict[str, Any]:
        """PEFT's adapter_config.json; empty where there is none."""
        return read_json_object(self.path / PEFT_CONFIG) if self.has(PEFT_CONFIG) else {}

    @cached_property
    def peft_weights(self) -> TensorFile:
        return self.weights(PEFT_WEIGHTS)

    def weights(self, *names: str) -> TensorFile:
        """The first of these files that is there. Raises NotFoundError, and FileFormatError where
        there is nothing but a pickle."""
        for name in names:
            if self.has(name):
                return TensorFile(self.path / name)
        self.refuse_pickles(names[0])
        raise NotFoundError(f"{self.path / names[0]}: no such file; expected the weights")

    def refuse_pickles(self, expected: str) -> None:
        """Raise FileFormatError where there is a pickle, saying how to make `expected` of it."""
        pickles = sorted(p.name for p in self.path.iterdir() if p.name.endswith(PICKLES))
        if pickles:
            raise FileFormatError(
                f"{self.path / pickles[0]}",
                "a pickle, which can run code when it is read",
                f"{expected}; convert it where you trust it: import torch; from safetensors.torch "
                "import save_file; save_file({k: v.contiguous() for k, v in "
                f"torch.load({pickles[0]!r}, weights_only=True).items()}}, {expected!r})",
            )
