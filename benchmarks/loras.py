"""Synthetic LoRAs of a model as PEFT folders: a few families of users, and noise."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorasb_runtime.models.skeleton import LinearLayer, linear_layers


@dataclass(frozen=True)
class LoraSet:
    """`count` LoRAs of one rank; LoRA i is of family i % families.

    A family's LoRAs lie in its own `width` directions of each module, but for noise whose strength
    is relative, and share `alike` of the energy of their factors within these. size: rms of a
    delta's entries, about.
    """

    count: int
    rank: int = 16
    families: int = 4
    width: int = 12
    noise: float = 0.2
    alike: float = 0.7
    size: float = 1e-4
    seed: int = 0


def write_loras(
    model: Path, loras: LoraSet, folder: Path, report: Callable[[int], None] = lambda _: None
) -> list[Path]:
    """One PEFT folder each, bfloat16, for all linear layers but the output embedding."""
    layers = {n: layer for n, layer in linear_layers(model).items() if n != "lm_head"}
    families = [_family(layers, loras, loras.seed + f) for f in range(loras.families)]
    config = {
        "peft_type": "LORA",
        "r": loras.rank,
        "lora_alpha": 2 * loras.rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "base_model_name_or_path": model.name,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    paths = []
    for index in range(loras.count):
        family = index % loras.families
        generator = torch.Generator().manual_seed(1000 + loras.seed * 100_003 + index)
        tensors = {}
        for name, (u, v) in families[family].items():
            b, a = _draw(u, loras, generator), _draw(v, loras, generator)
            key = f"base_model.model.{name}"
            strength = loras.size * (layers[name].out_features * layers[name].in_features) ** 0.5
            tensors[f"{key}.lora_B.weight"] = (strength / 2 * b).bfloat16()
            tensors[f"{key}.lora_A.weight"] = a.t().contiguous().bfloat16()
        path = folder / f"family{family}-user{index:04}"
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(config, indent=2))
        paths.append(path)
        report(index + 1)
    return paths


@dataclass(frozen=True)
class _Side:
    """What a family's LoRAs have in common on one side of a module.

    directions: [size, width] orthonormal. mean: [width, rank].
    """

    directions: torch.Tensor
    mean: torch.Tensor


def _family(
    layers: dict[str, LinearLayer], loras: LoraSet, seed: int
) -> dict[str, tuple[_Side, _Side]]:
    """The sides out and in of each module."""
    generator = torch.Generator().manual_seed(seed)

    def side(size: int) -> _Side:
        directions = torch.linalg.qr(torch.randn(size, loras.width, generator=generator)).Q
        return _Side(directions, torch.randn(loras.width, loras.rank, generator=generator))

    return {name: (side(x.out_features), side(x.in_features)) for name, x in layers.items()}


def _draw(side: _Side, loras: LoraSet, generator: torch.Generator) -> torch.Tensor:
    """[size, rank], its Frobenius norm about 1."""
    size, width = side.directions.shape
    own = torch.randn(width, loras.rank, generator=generator)
    mixed = loras.alike**0.5 * side.mean + (1 - loras.alike) ** 0.5 * own
    noise = torch.randn(size, loras.rank, generator=generator) / size**0.5
    return (side.directions @ mixed / width**0.5 + loras.noise * noise) / loras.rank**0.5
