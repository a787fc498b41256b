"""A checkpoint as the merged one will have it: quantized weights unpacked, a tied head apart."""

from dataclasses import dataclass, field, replace

import torch

from lorasb_runtime.errors import InputError
from lorasb_runtime.merging import quantized
from lorasb_runtime.merging.fold import Rows
from lorasb_runtime.merging.quantized import Packed
from lorasb_runtime.merging.untie import find_tied_head, refuse_tied_head, untie
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.checkpoint import Checkpoint, TensorEntry
from lorasb_runtime.storage.mapped_shard import MappedShard
from lorasb_runtime.storage.shard_writer import NAMES


@dataclass(frozen=True)
class ModelView:
    """The tensors by the names, dtypes and shapes that they have unpacked and untied.

    Of a tensor in `packed` the checkpoint's entry gives no place, but the shard it goes to.
    """

    checkpoint: Checkpoint
    packed: dict[str, Packed] = field(default_factory=dict)
    untied: str | None = None  # the head that was given a tensor of its own


def view_model(
    source: Checkpoint, basis: Basis, dtype: torch.dtype | None, *, dequantize: bool, untied: bool
) -> ModelView:
    """What to merge into. dtype: of unpacked weights; by default the one that the config names.

    Raises InputError where the model is quantized or the basis has a tied head, and this was not
    asked to be changed, or was asked for in vain.
    """
    view = ModelView(source)
    if dequantize:
        view = _unpack(source, dtype)
    elif source.config.get("quantization_config") is not None:
        raise InputError(
            f"{source.folder}: found a quantized checkpoint, expected plain weights; pass "
            f"--dequantize (for {', '.join(quantized.METHODS)}), or "
            f"{quantized.way_out(source)}"
        )
    head = find_tied_head(source, basis)
    if head is not None and not untied:
        raise refuse_tied_head(head)
    if untied:
        if head is None:
            raise InputError("--untie: found no target on a tied output embedding to be untied")
        apart = untie(view.checkpoint, head)
        view = replace(view, checkpoint=apart, untied=head.module)
    return view


def _unpack(source: Checkpoint, dtype: torch.dtype | None) -> ModelView:
    packed, gone = quantized.find_packed(source)
    name = NAMES[dtype or _own_dtype(source)]
    width = next(d for d, n in NAMES.items() if n == name).itemsize
    tensors = {n: entry for n, entry in source.tensors.items() if n not in gone | packed.keys()}
    for unpacked, parts in packed.items():
        nbytes = torch.Size(parts.shape).numel() * width
        place = parts.values
        tensors[unpacked] = TensorEntry(place.file, name, parts.shape, place.offset, nbytes)
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    return ModelView(replace(source, config=config, tensors=tensors), packed)


def _own_dtype(source: Checkpoint) -> torch.dtype:
    named = source.config.get("dtype") or source.config.get("torch_dtype")
    found = next((d for d in NAMES if str(d) == f"torch.{named}"), None)
    return found or torch.bfloat16


class ViewReader:
    """Reads a view's tensors through the memory maps of the shards."""

    def __init__(self, view: ModelView) -> None:
        self._view = view
        self._folder = view.checkpoint.folder
        self._maps: dict[str, MappedShard] = {}

    def rows(self, name: str, expert: int | None = None) -> Rows:
        """A tensor, or one of a stack's matrices, as a matrix of rows; a vector has one."""
        packed = self._view.packed.get(name)
        if packed is not None:
            parts = packed if expert is None else packed.part(expert)
            return quantized.open_rows(parts, self._tensor)
        entry = self._view.checkpoint.tensors[name]
        tensor = self._tensor(entry if expert is None else entry.part(expert))
        return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)

    def whole(self, name: str) -> torch.Tensor:
        """A tensor in its own shape, unpacked; not to be changed."""
        packed = self._view.packed.get(name)
        if packed is None:
            return self._tensor(self._view.checkpoint.tensors[name])
        if len(packed.shape) == 2:
            return quantized.open_rows(packed, self._tensor)[:]
        return torch.stack([self.rows(name, i)[:] for i in range(packed.shape[0])])

    def raw(self, name: str, expert: int | None = None) -> memoryview:
        """The bytes of a tensor that is not packed, or of one of a stack's matrices."""
        entry = self._view.checkpoint.tensors[name]
        entry = entry if expert is None else entry.part(expert)
        return self._map(entry.file).raw(entry)

    def _tensor(self, entry: TensorEntry) -> torch.Tensor:
        return self._map(entry.file).tensor(entry)

    def _map(self, file: str) -> MappedShard:
        if file not in self._maps:
            self._maps[file] = MappedShard(self._folder / file)
        return self._maps[file]
