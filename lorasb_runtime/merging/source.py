"""What must hold of a checkpoint before a delta is added to it."""

import json

from safetensors import SafetensorError, safe_open

from lorasb_runtime.errors import FileFormatError, InputError
from lorasb_runtime.merging.view import ModelView
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.checkpoint import INDEX, Checkpoint, WeightPlace
from lorasb_runtime.storage.shard_writer import DTYPES


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


def target_weights(
    view: ModelView, basis: Basis, without: str | None = None
) -> dict[WeightPlace, int]:
    """From each target's weight to its index; raises InputError for weights that take no delta.

    without: a target that is left out.
    """
    targets: dict[WeightPlace, int] = {}
    for index, target in enumerate(basis.targets):
        if target.module == without:
            continue
        place = view.checkpoint.find_weight(target.module)
        dtype = view.checkpoint.tensors[place.name].dtype
        if dtype not in DTYPES:
            raise InputError(
                f"{place.name}: found dtype {dtype}, expected one of {', '.join(DTYPES)}"
            )
        if place in targets:
            raise InputError(
                f"{place.name}: found it as the weight of {target.module} and of "
                f"{basis.targets[targets[place]].module}, expected one target for each weight"
            )
        targets[place] = index
    return targets
