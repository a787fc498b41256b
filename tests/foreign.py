"""Checkpoints of other programs for tests: made by PEFT itself wherever PEFT makes the format."""

import json
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

TOKENS = [5, 90, 17, 200, 33, 41, 7, 64]
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def peft_model(base: Path, config: PeftConfig, seed: int = 0) -> PeftModel:
    """The base model in float32 with an adapter whose every number is random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or "tinylora_v" in name:
                parameter.normal_(std=0.5)
    return made


def save_peft(base: Path, folder: Path, config: PeftConfig, seed: int = 0) -> Path:
    """A random adapter as `save_pretrained` leaves it."""
    save(peft_model(base, config, seed), folder)
    return folder


def save(model: PeftModel, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


def peft_logits(base: Path, folder: Path, tokens: list[int] = TOKENS) -> torch.Tensor:
    """Logits [tokens, vocab] of the adapter in `folder`, as PEFT loads and applies it, float64."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(model, folder).double()
    with torch.inference_mode():
        logits: torch.Tensor = adapted(input_ids=torch.tensor([tokens])).logits[0]
    return logits


def lora_config(**changes: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return LoraConfig(**{**settings, **changes})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def set_config(folder: Path, **changes: Any) -> None:
    """Change fields of adapter_config.json; ... (Ellipsis) takes one away."""
    config = {**json.loads((folder / CONFIG).read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(kept))


def save_latent(
    base: Path,
    folder: Path,
    method: str = "lora-sb",
    *,
    old_keys: bool = False,
    dtype: torch.dtype = torch.float32,
    basis_seed: int = 0,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """What the training code of LoRA-SB or LoRA-XS leaves: frozen A and B, and a core between.

    They hang a Linear named `default_lora_latent_mapping` on each of PEFT's layers. With old_keys
    its key is what PEFT up to 0.17 makes of that name.
    """
    model = peft_model(base, lora_config(**{"lora_alpha": 4, **changes}))
    generator = torch.Generator().manual_seed(basis_seed)
    noise = torch.Generator().manual_seed(1000 + seed)
    for _, layer in sorted(model.named_modules()):
        if not hasattr(layer, "lora_A") or "default" not in layer.lora_A:
            continue
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        rank = a.shape[0]
        rows = torch.linalg.qr(torch.randn(a.shape[1], rank, generator=generator)).Q.t()
        if method == "lora-xs":
            rows = rows * torch.linspace(3, 0.5, rank)[:, None]
        a.data = rows.contiguous().to(dtype)
        b.data = torch.linalg.qr(torch.randn(b.shape, generator=generator)).Q.to(dtype)
        layer.default_lora_latent_mapping = torch.nn.Linear(rank, rank, bias=False)
        layer.default_lora_latent_mapping.weight.data = torch.randn(rank, rank, generator=noise).to(
            dtype
        )
    save(model, folder)
    tensors = tensors_of(folder)
    assert sum("lora_latent_mapping" in name for name in tensors) == len(tensors) // 3
    if old_keys:
        tensors = {name.replace(".default", ""): tensor for name, tensor in tensors.items()}
        assert any("_proj_lora_latent_mapping.weight" in name for name in tensors)
        rewrite(folder, tensors)
    return folder


def dense(folder: Path, module: str, scaling: float = 1.0) -> torch.Tensor:
    """scaling * B R A of one module of a LoRA or latent checkpoint, in float64."""
    tensors = {name: tensor.double() for name, tensor in tensors_of(folder).items()}
    a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
    core = next(
        (t for n, t in tensors.items() if n.startswith(f"{PREFIX}{module}") and "latent" in n),
        torch.eye(a.shape[0], dtype=torch.float64),
    )
    return scaling * (b @ core @ a)
