"""XGBLoRA (arXiv 2410.19694): an ordered sequence of small LoRAs, each trained on top of the last.

Their sum is one adapter, B = [b_1 ... b_T] and A below one another; its first K are a model too.
"""

import re
from pathlib import Path

import torch

from lorasb_runtime.errors import FileFormatError, InputError
from lorasb_runtime.importing.folder import PEFT_CONFIG, CheckpointFolder
from lorasb_runtime.importing.foreign import Factors, ForeignAdapter
from lorasb_runtime.importing.model import Model
from lorasb_runtime.importing.peft_tensors import in_model_order
from lorasb_runtime.importing.readers import lora

NAME = "xgblora"


def read(folder: CheckpointFolder, model: Model | None, prefix: int | None) -> ForeignAdapter:
    """The sum of the first `prefix` LoRAs in the folders inside, by the numbers of their names.

    Its own basis is that of all of them, so that every prefix has the same. Raises InputError,
    and FileFormatError for boosters that do not fit together.
    """
    paths = booster_paths(folder)
    count = len(paths) if prefix is None else prefix
    if not 0 < count <= len(paths):
        raise InputError(f"prefix: found {prefix}, expected 1 to {len(paths)} boosters")
    boosters = [lora.read(CheckpointFolder(path), model) for path in paths]
    parts: dict[str, list[tuple[Factors, bool]]] = {}
    for index, booster in enumerate(boosters):
        for module, factors in booster.modules.items():
            assert isinstance(factors, Factors)
            parts.setdefault(module, []).append((factors, index < count))
    modules = {
        module: _concatenate(folder.source, module, parts[module])
        for module in in_model_order(parts)
    }
    names = {booster.base_model for booster in boosters}
    return ForeignAdapter(
        folder.source,
        NAME,
        modules,
        transposed=frozenset().union(*(booster.transposed for booster in boosters)),
        base_model=names.pop() if len(names) == 1 else None,
        info={"boosters": [path.name for path in paths[:count]], "of": len(paths)},
    )


def booster_paths(folder: CheckpointFolder) -> list[Path]:
    """The folders inside that hold an adapter, ordered by the number that ends their names."""
    numbered: dict[int, Path] = {}
    for path in sorted(p for p in folder.path.iterdir() if (p / PEFT_CONFIG).exists()):
        number = re.search(r"([0-9]{1,18})$", path.name)
        if number is None:
            raise InputError(f"{path}: found no number at the end of its name, expected the step")
        if int(number[1]) in numbered:
            first = numbered[int(number[1])]
            raise InputError(f"{path}: found the number of {first.name}, expected each once")
        numbered[int(number[1])] = path
    if not numbered:
        raise InputError(f"{folder.source}: found no folder with {PEFT_CONFIG}, expected boosters")
    return [path for _, path in sorted(numbered.items())]


def _concatenate(source: str, module: str, parts: list[tuple[Factors, bool]]) -> Factors:
    """One module's boosters side by side; those that do not count have zeros in the core."""
    shapes = {(factors.out_features, factors.in_features) for factors, _ in parts}
    if len(shapes) > 1:
        found = f"{module} of shapes {', '.join(str(list(s)) for s in sorted(shapes))}"
        raise FileFormatError(source, found, "one shape in all boosters")
    b = torch.cat([factors.b.float() for factors, _ in parts], dim=1)
    a = torch.cat([factors.a.float() for factors, _ in parts])
    every, counted = [], []
    for factors, counts in parts:
        scalings = torch.full((factors.a.shape[0],), factors.scaling, dtype=torch.float64)
        every.append(scalings)
        counted.append(scalings * counts)
    return Factors(b, a, torch.cat(counted), whole=Factors(b, a, torch.cat(every)))
