"""PEFT's AdaLoRA and TinyLoRA imported without a basis: the same logits as PEFT gives."""

from pathlib import Path

import pytest
import torch
from foreign import (
    PREFIX,
    lora_config,
    peft_model,
    rewrite,
    save,
    save_peft,
    set_config,
    tensors_of,
)
from imports import check_logits, import_one
from peft import AdaLoraConfig, PeftConfig, TinyLoraConfig

from lorasb_runtime.errors import FileFormatError, InputError
from lorasb_runtime.storage.basis_file import load_basis

Q = "model.layers.0.self_attn.q_proj"


def ada_config(**changes: object) -> AdaLoraConfig:
    settings: dict[str, object] = {
        "init_r": 5,
        "target_r": 2,
        "lora_alpha": 8,
        "tinit": 1,
        "tfinal": 1,
        "deltaT": 1,
        "total_step": 9,
        "target_modules": ["q_proj", "v_proj"],
    }
    return AdaLoraConfig(**{**settings, **changes})


@pytest.mark.parametrize("alpha", [8, 0])
def test_an_adalora_gives_pefts_logits(alpha: int, pico: Path, tmp_path: Path) -> None:
    folder = save_peft(pico, tmp_path / "ada", ada_config(lora_alpha=alpha))
    imported = check_logits(pico, folder, tmp_path / "out")
    assert (imported.format, imported.info) == ("peft-adalora", {})


def test_a_pruned_adalora_keeps_the_scaling_of_its_first_rank(pico: Path, tmp_path: Path) -> None:
    model = peft_model(pico, ada_config())
    with torch.no_grad():  # what is to be pruned: all of one module, and every second direction
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter[::2] = 0
                parameter *= Q not in name
    model.peft_config["default"].rank_pattern = {
        name.removeprefix(PREFIX): (parameter != 0).flatten().tolist()
        for name, parameter in model.named_parameters()
        if "lora_E" in name
    }
    save(model, tmp_path / "ada")
    imported = check_logits(pico, tmp_path / "ada", tmp_path / "out")
    assert imported.info == {"pruned": [Q]}
    basis = load_basis(tmp_path / "out" / "basis.safetensors")
    assert {t.rank for t in basis.targets} == {2}
    assert Q not in {t.module for t in basis.targets}


def tiny_config(tying: float) -> TinyLoraConfig:
    modules = ["q_proj", "v_proj", "down_proj"]
    return TinyLoraConfig(r=3, u=4, weight_tying=tying, target_modules=modules)


@pytest.mark.parametrize("tying", [0.0, 0.4, 0.7, 1.0])
def test_a_tinylora_gives_pefts_logits(tying: float, pico: Path, tmp_path: Path) -> None:
    folder = save_peft(pico, tmp_path / "tiny", tiny_config(tying))
    imported = check_logits(pico, folder, tmp_path / "out", model=tying < 1)
    assert imported.format == "peft-tinylora"
    basis = load_basis(tmp_path / "out" / "basis.safetensors")
    a = tensors_of(folder)[f"{PREFIX}{Q}.tinylora_A"]
    assert torch.equal(basis.a(Q), a) and basis.scaling == 1.0


def test_a_tinylora_of_conv1d_layers_gives_pefts_logits(pico_gpt2: Path, tmp_path: Path) -> None:
    config = TinyLoraConfig(r=2, u=3, target_modules=["c_attn"], fan_in_fan_out=True)
    folder = save_peft(pico_gpt2, tmp_path / "tiny", config)
    check_logits(pico_gpt2, folder, tmp_path / "out", model=True)


def test_tinyloras_need_the_model_and_their_matrices(pico: Path, tmp_path: Path) -> None:
    folder = save_peft(pico, tmp_path / "tiny", tiny_config(0.0))
    with pytest.raises(InputError, match=r"found 6 vectors, .* in their order; pass --model"):
        import_one(folder, tmp_path / "out")
    tensors = tensors_of(folder)
    rewrite(folder, {n: t for n, t in tensors.items() if not n.endswith("tinylora_v.3")})
    with pytest.raises(FileFormatError, match=r"no tensor 'base_model\.tinylora_v\.3'"):
        import_one(folder, tmp_path / "out", model=pico)
    rewrite(folder, {n: t for n, t in tensors.items() if "tinylora_P" not in n})
    with pytest.raises(InputError, match=r"found no tinylora_P, .*save_projection=True"):
        import_one(folder, tmp_path / "out", model=pico)
    set_config(folder, weight_tying=0.5)
    rewrite(folder, tensors)
    with pytest.raises(FileFormatError, match="found 6 vectors, expected 3 for a weight_tying"):
        import_one(folder, tmp_path / "out", model=pico)


KINDS: dict[str, PeftConfig] = {"lora": lora_config(), "ada": ada_config()}


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_are_not_the_configs_are_refused(kind: str, pico: Path, tmp_path: Path) -> None:
    folder = save_peft(pico, tmp_path / kind, KINDS[kind])
    set_config(folder, **({"r": 3} if kind == "lora" else {"init_r": 4}))
    with pytest.raises(FileFormatError, match=r"found rank [34] for model\..*, expected [45] as"):
        import_one(folder, tmp_path / "out")
