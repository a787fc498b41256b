"""What must hold of a checkpoint before a delta is added to it."""

import json

from safetensors import SafetensorError, safe_open

from lorasb_runtime.errors import FileFormatError, InputError
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.checkpoint import INDEX, Checkpoint
from lorasb_runtime.storage.shard_writer import DTYPES
from lorasb_runtime.types import TargetModule


def check_shards(source: Checkpoint) -> None:
    """Raise FileFormatError unless each shard is whole and each tensor lies where it should.

    That is in one shard only, and in the one that the index names, where there is an index.
    """
    home: dict[str, str] = {}
    for shard in source.shards:
        path = source.folder / shard
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
        except SafetensorError as error:
            detail = " ".join(str(error).split())
            raise FileFormatError(str(path), f"damage ({detail})", "a whole shard") from None
        for name in names:
            if name in home:
                raise FileFormatError(
                    str(path), f"a duplicate of {name}, also in {home[name]}", "each tensor once"
                )
            home[name] = shard
    index = source.folder / INDEX
    if not index.is_file():
        return
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for name in sorted(listed.keys() | home.keys()):
        if listed.get(name) != home.get(name):
            raise FileFormatError(
                str(index),
                f"{name} in {listed.get(name, 'no shard')}",
                f"it in {home.get(name, 'none, as no shard has it')}",
            )


def target_tensors(source: Checkpoint, basis: Basis) -> dict[str, int]:
    """From tensor name to target index; raises InputError for weights that cannot be merged."""
    if source.config.get("quantization_config") is not None:
        raise InputError(
            f"{source.folder}: found a quantized checkpoint, expected plain weights; "
            "dequantize it first"
        )
    targets: dict[str, int] = {}
    for index, target in enumerate(basis.targets):
        name = source.weight_name(target.module)
        dtype = source.tensors[name].dtype
        if dtype not in DTYPES:
            raise InputError(f"{name}: found dtype {dtype}, expected one of {', '.join(DTYPES)}")
        if name in targets:
            raise InputError(
                f"{name}: found it as the weight of {target.module} and of "
                f"{basis.targets[targets[name]].module}, expected one target for each weight"
            )
        if _is_tied_head(source, target):
            raise InputError(
                f"{target.module}: found an output embedding tied to the input's, expected a "
                "weight of its own; no reader of the checkpoint would see it merged"
            )
        targets[name] = index
    return targets


def _is_tied_head(source: Checkpoint, target: TargetModule) -> bool:
    """Whether loaders ignore this tensor in favour of the input embedding.

    An output embedding is known by its shape and by lying outside the numbered blocks.
    """
    return (
        source.config.get("tie_word_embeddings") is True
        and target.out_features == source.config.get("vocab_size")
        and not any(part.isdigit() for part in target.module.split("."))
    )
