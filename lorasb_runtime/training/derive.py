"""Deriving a basis: model, gradients and basis method put together."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasb_runtime.basis import find_method
from lorasb_runtime.errors import InputError
from lorasb_runtime.models.load import load_causal_lm, load_tokenizer, parse_dtype
from lorasb_runtime.models.locate import identify, locate_model
from lorasb_runtime.models.targets import find_targets, weight_of
from lorasb_runtime.models.text import TextCodec
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.checkpoint import open_checkpoint
from lorasb_runtime.training.data import DataFile, Example, data_paths, read_data
from lorasb_runtime.training.gradients import summed_gradients
from lorasb_runtime.types import Report


@dataclass(frozen=True)
class DeriveConfig:
    """`targets` is a regular expression, None for every linear layer but the output embedding."""

    method: str = "lora-sb"
    rank: int = 16
    samples: int = 64
    targets: str | None = None
    seed: int = 0
    dtype: str = "float32"
    max_length: int = 1024
    batch_size: int = 8


def derive_basis(model: str, data: list[Path], config: DeriveConfig, report: Report) -> Basis:
    """Make a basis for MODEL; the same input gives the same basis, bit for bit.

    Several data files are one pool, from which the samples are drawn evenly. Raises InputError
    for data that the method needs and lacks, or does not need and is given.
    """
    method = find_method(config.method)
    if method.needs_gradient and not data:
        raise InputError(f"method {config.method} needs --data, the samples of its gradient")
    if data and not method.needs_gradient:
        raise InputError(f"method {config.method} takes no --data: its basis is of the weights")
    for name in ("samples", "batch_size"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}: found {getattr(config, name)}, expected at least 1")
    folder = locate_model(model)
    loaded = load_causal_lm(folder, parse_dtype(config.dtype))
    targets = find_targets(loaded, config.rank, config.targets)
    if method.needs_gradient:
        codec = TextCodec(load_tokenizer(folder))
        files = [read_data(path, codec, config.max_length) for path in data_paths(data)]
        samples = draw_samples(files, config.samples, config.seed)
        total = len(samples)
        matrices = summed_gradients(
            loaded,
            targets,
            samples,
            config.batch_size,
            lambda done, loss: report("gradient", done, total, f"loss {loss:.3f}"),
        )
        info = _describe(config, files, total)
    else:
        matrices = {t.module: weight_of(loaded.get_submodule(t.module)) for t in targets}
        info = _describe(config, [], 0)
    tensors: dict[str, torch.Tensor] = {}
    for done, target in enumerate(targets, 1):
        pair = method.make_pair(matrices.pop(target.module), config.rank)
        tensors[f"{target.module}.A"] = pair.a.contiguous()
        tensors[f"{target.module}.B"] = pair.b.contiguous()
        if pair.r0 is not None:
            tensors[f"{target.module}.R0"] = pair.r0.contiguous()
        report("svd", done, len(targets), target.module)
    identity = identify(model, open_checkpoint(folder))
    return Basis(targets, tensors, config.method, 1.0, identity, info)


def draw_samples(files: list[DataFile], count: int, seed: int) -> list[Example]:
    """Up to `count` examples: each file shuffled by the seed, then one from each in turn."""
    shuffled = []
    for index, file in enumerate(files):
        examples = list(file.examples)
        random.Random(f"{seed}:{index}").shuffle(examples)
        shuffled.append(examples)
    drawn = []
    for turn in range(max(len(examples) for examples in shuffled)):
        drawn += [examples[turn] for examples in shuffled if turn < len(examples)]
    return drawn[:count]


def _describe(config: DeriveConfig, files: list[DataFile], samples: int) -> dict[str, Any]:
    """What the basis was made from; nothing here depends on when or where."""
    info: dict[str, Any] = {"method": config.method, "rank": config.rank, "dtype": config.dtype}
    if files:
        info["samples"] = samples
        info["seed"] = config.seed
        info["init_lr"] = 1.0
        info["data"] = [{"name": f.name, "digest": f.digest} for f in files]
    return info
