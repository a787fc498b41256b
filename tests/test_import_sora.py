"""SoRA's OpenDelta checkpoints: the gate is the core, and what it closed is gone."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lorasb_runtime.errors import FileFormatError, InputError
from lorasb_runtime.importing.run import ImportConfig, ImportResult, import_checkpoints

Q, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")
RANK, ALPHA = 6, 9
OPEN = {Q: [0, 2, 5], V: []}


def save_sora(folder: Path, name: str = "model.safetensors", **config: Any) -> dict[str, Any]:
    """What OpenDelta's save_finetuned leaves for SoRA's LoraModel, converted from the pickle."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, width in ((Q, 32), (V, 16)):
        tensors[f"{module}.lora.lora_A"] = torch.randn(RANK, 32, generator=generator)
        tensors[f"{module}.lora.lora_B"] = torch.randn(width, RANK, generator=generator)
        gate = torch.zeros(1, RANK)
        gate[0, OPEN[module]] = torch.randn(len(OPEN[module]), generator=generator)
        tensors[f"{module}.lora.gate"] = gate
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, folder / name)
    settings = {"delta_type": "lora", "lora_r": RANK, "lora_alpha": ALPHA, **config}
    kept = {key: value for key, value in settings.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return tensors


def run(folder: Path, output: Path) -> ImportResult:
    return import_checkpoints([folder], ImportConfig(), output)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.safetensors"])
def test_the_delta_is_that_of_its_forward_pass(name: str, tmp_path: Path) -> None:
    """y = ((x A') * gate) B' * alpha / r, with the r of the start, as in its LowRankLinear."""
    tensors = save_sora(tmp_path / "sora", name)
    result = run(tmp_path / "sora", tmp_path / "out")
    (target,) = result.basis.targets
    assert (target.module, target.rank) == (Q, 3)
    assert result.adapters[0].info == {"closed": [V]}
    x = torch.randn(5, 32)
    a, b, gate = (tensors[f"{Q}.lora.{part}"] for part in ("lora_A", "lora_B", "gate"))
    expected = ((x @ a.T).mul(gate) @ b.T) * (ALPHA / RANK)
    core = result.basis.core(result.adapters[0].adapter.cores, 0)
    found = x @ (result.basis.b(Q) @ core @ result.basis.a(Q)).T
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_r": None}, "found no lora_r and lora_alpha, expected OpenDelta's configuration"),
        ({"lora_alpha": None}, "found no lora_r and lora_alpha"),
        ({"lora_r": 0}, "found lora_r 0 and lora_alpha 9, expected a whole number"),
        ({"lora_r": "6"}, "found lora_r '6'"),
        ({"lora_alpha": True}, "and lora_alpha True"),
        ({"lora_alpha": float("inf")}, "and lora_alpha inf"),
        ({"lora_r": 5}, "of rank 6, expected at most lora_r, 5"),
    ],
)
def test_wrong_configurations_are_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_sora(tmp_path / "sora", **config)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "sora", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{Q}.lora.gate", None, "alone, expected its sora_gate as well"),
        (f"{Q}.lora.gate", torch.ones(1, 5), r"a core of shape \[5\], expected the rank 6"),
        (f"{Q}.lora.gate", torch.ones(6, 1), r"of shape \[6, 1\], expected \[1, r\]"),
        (f"{Q}.lora.gate", torch.zeros(1, 6), "found gates that are all zero"),
        ("model.norm.layer_norm.weight", torch.ones(4), "a tensor 'model.norm.layer_norm.weight'"),
        ("classifier.out_proj.bias", torch.ones(4), "a trained bias"),
    ],
)
def test_wrong_tensors_are_refused(
    name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    tensors = save_sora(tmp_path / "sora")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    safetensors.torch.save_file(tensors, tmp_path / "sora" / "model.safetensors")
    with pytest.raises((InputError, FileFormatError), match=message):
        run(tmp_path / "sora", tmp_path / "out")
