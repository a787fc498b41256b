"""Quantized weights that plain arithmetic unpacks: 8-bit numbers with scales, and MXFP4.

Formulas and names as transformers reads them (quant_method `fp8`, `compressed-tensors`, `mxfp4`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lorasb_runtime.errors import FileFormatError, InputError
from lorasb_runtime.storage.checkpoint import Checkpoint, TensorEntry

METHODS = ("fp8", "compressed-tensors", "mxfp4")
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")
# Scales beside a packed weight `x.weight`: the first two multiply it, the others are for inputs.
SCALES = ("weight_scale_inv", "weight_scale")
INPUT_SCALES = ("input_scale", "activation_scale", "k_scale", "v_scale")
MXFP4_BLOCK = 32
# The sixteen numbers of E2M1, by their four bits (OCP Microscaling Formats, version 1.0).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Packed:
    """One quantized tensor: its numbers and scales, and the shape that it has unpacked."""

    values: TensorEntry
    scales: TensorEntry
    shape: tuple[int, ...]
    block: tuple[int, int]

    def part(self, index: int) -> "Packed":
        """One of the matrices that a stacked tensor consists of."""
        values, scales = self.values.part(index), self.scales.part(index)
        return Packed(values, scales, self.shape[1:], self.block)


class ScaledRows:
    """values [out, in] of 8 bits, each times the scale of its block, in float32."""

    dtype = torch.float32

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> None:
        self._values = values
        self._scales = scales.float()
        self._block = block
        self.shape = values.shape

    def __getitem__(self, rows: slice) -> torch.Tensor:
        high, wide = self._block
        values = self._values[rows].float()
        of_rows = torch.arange(self.shape[0])[rows] // high
        scales = self._scales[of_rows].repeat_interleave(wide, dim=1)
        return values.mul_(scales[:, : values.shape[1]])


class Mxfp4Rows:
    """Blocks uint8 [out, in / 32, 16] and exponents uint8 [out, in / 32] as [in, out] in float32.

    A byte holds two numbers, the lower four bits first; exact in bfloat16, too.
    """

    dtype = torch.float32

    def __init__(self, blocks: torch.Tensor, exponents: torch.Tensor) -> None:
        self._blocks = blocks
        self._exponents = exponents
        self._table = torch.tensor([*E2M1, *(-x for x in E2M1)])
        self.shape = torch.Size((blocks.shape[1] * MXFP4_BLOCK, blocks.shape[0]))

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        first, last = start // MXFP4_BLOCK, -(-stop // MXFP4_BLOCK)
        packed = self._blocks[:, first:last]
        numbers = self._table[torch.stack((packed & 15, packed >> 4), dim=-1).int()]
        exponents = self._exponents[:, first:last].int() - 127
        numbers = torch.ldexp(numbers.flatten(2), exponents[..., None]).flatten(1)
        offset = first * MXFP4_BLOCK
        return numbers.t()[start - offset : stop - offset]


def find_packed(source: Checkpoint) -> tuple[dict[str, Packed], set[str]]:
    """The quantized tensors by the names that they have unpacked, and the names that go away.

    Raises InputError for a checkpoint that is not quantized, or in a way not known here.
    """
    config = source.config.get("quantization_config")
    if config is None:
        raise InputError(f"{source.folder}: found plain weights, expected quantized ones to unpack")
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method not in METHODS:
        raise InputError(
            f"{source.folder}: found quantization method {method!r}, expected one of "
            f"{', '.join(METHODS)} to unpack; {way_out(source)}"
        )
    find = _find_mxfp4 if method == "mxfp4" else _find_scaled
    packed, gone = find(source, config)
    if not packed:
        raise FileFormatError(str(source.folder), "no quantized tensors", f"weights of {method}")
    return packed, gone


def way_out(source: Checkpoint) -> str:
    """What to do with a checkpoint that is quantized in another way."""
    return (
        "merge into the checkpoint that it was made from, or unpack it first (in transformers: "
        "model.dequantize(), then save_pretrained)"
    )


def _find_scaled(source: Checkpoint, config: dict[str, Any]) -> tuple[dict[str, Packed], set[str]]:
    packed: dict[str, Packed] = {}
    gone: set[str] = set()
    block = _configured_block(config)
    for name, entry in source.tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf in INPUT_SCALES:
            gone.add(name)
        if leaf in ("weight_zero_point", "weight_packed", "weight_shape", "weight_g_idx"):
            raise InputError(f"{name}: found a weight packed below 8 bits; {way_out(source)}")
        if entry.dtype not in EIGHT_BITS:
            continue
        scale = next((f"{stem}.{s}" for s in SCALES if f"{stem}.{s}" in source.tensors), None)
        if leaf != "weight" or scale is None or len(entry.shape) != 2:
            raise FileFormatError(
                str(source.folder), f"{name} of {entry.dtype}", "a matrix with scales beside it"
            )
        scales = source.tensors[scale]
        packed[name] = Packed(entry, scales, entry.shape, _block(name, entry, scales, block))
        gone.add(scale)
    return packed, gone


def _configured_block(config: dict[str, Any]) -> tuple[int, int] | None:
    """Numbers that share a scale, [rows, columns], where the config says so."""
    groups = config.get("config_groups")
    sizes = config.get("weight_block_size")
    if isinstance(groups, dict):
        weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)]
        sizes = next(
            (w["block_structure"] for w in weights if w and w.get("block_structure")), None
        )
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(s) is int for s in sizes):
        return None
    return (sizes[0], sizes[1]) if min(sizes) > 0 else None


def _block(
    name: str, values: TensorEntry, scales: TensorEntry, block: tuple[int, int] | None
) -> tuple[int, int]:
    """One scale for all, for each row, or for each block of the configured size."""
    rows, columns = values.shape
    if scales.shape in ((), (1,), (1, 1)):
        return rows, columns
    if scales.shape in ((rows,), (rows, 1)):
        return 1, columns
    if block is not None and scales.shape == (-(-rows // block[0]), -(-columns // block[1])):
        return block
    raise FileFormatError(
        name,
        f"scales of shape {list(scales.shape)} for {list(values.shape)}",
        f"one for all, one for each row, or one for each block of {block or 'a configured size'}",
    )


def _find_mxfp4(source: Checkpoint, config: dict[str, Any]) -> tuple[dict[str, Packed], set[str]]:
    packed: dict[str, Packed] = {}
    gone: set[str] = set()
    for name, entry in source.tensors.items():
        stem, _, leaf = name.rpartition("_")
        if leaf != "blocks" or entry.dtype != "U8":
            continue
        scales = source.tensors.get(f"{stem}_scales")
        if scales is None or scales.dtype != "U8" or entry.shape != (*scales.shape, 16):
            raise FileFormatError(
                str(source.folder),
                f"{name} without its scales",
                f"{stem}_scales, a block of 32 each",
            )
        *stack, rows, blocks = scales.shape
        shape = (*stack, blocks * MXFP4_BLOCK, rows)
        packed[stem] = Packed(entry, scales, shape, (1, MXFP4_BLOCK))
        gone |= {name, f"{stem}_scales"}
    return packed, gone


def open_rows(
    packed: Packed, tensor: Callable[[TensorEntry], torch.Tensor]
) -> ScaledRows | Mxfp4Rows:
    """A packed matrix by its rows; `tensor` reads what lies at an entry."""
    values, scales = tensor(packed.values), tensor(packed.scales)
    if packed.values.dtype == "U8":
        return Mxfp4Rows(values, scales)
    rows, columns = packed.shape
    high, wide = packed.block
    return ScaledRows(values, scales.reshape(-(-rows // high), -(-columns // wide)), packed.block)
