"""What is left of a LoRA-SB or LoRA-XS checkpoint without its cores is no LoRA, and told apart."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from foreign import PREFIX, lora_config, rewrite, save_latent, save_peft, tensors_of

from lorasb_runtime.errors import InputError
from lorasb_runtime.importing.run import ImportConfig, ImportResult, import_checkpoints


def run(output: Path, folder: Path, **config: Any) -> ImportResult:
    return import_checkpoints([folder], ImportConfig(**config), output)


def lose_cores(folder: Path) -> Path:
    """What PEFT up to 0.17 saves of it under another adapter name than "default"."""
    rewrite(folder, {n: t for n, t in tensors_of(folder).items() if "latent" not in n})
    return folder


def test_a_checkpoint_that_lost_its_cores_is_told_apart_from_a_lora(
    pico: Path, tmp_path: Path
) -> None:
    lost = r"as of a {} checkpoint that has lost its cores .* under the name 'default'"
    for method in ("lora-sb", "lora-xs"):
        folder = lose_cores(save_latent(pico, tmp_path / method, method, dtype=torch.bfloat16))
        with pytest.raises(InputError, match=lost.format(method)):
            run(tmp_path / "out", folder)
    with pytest.raises(InputError, match=lost.format("lora-sb")):
        run(tmp_path / "out", tmp_path / "lora-sb", model=str(pico))
    plain = save_peft(pico, tmp_path / "plain", lora_config())
    assert run(tmp_path / "out", plain).adapters[0].format == "peft-lora"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_extracted_lora_is_told_from_lost_cores_by_the_model(
    kind: str, pico: Path, pico_gpt2: Path, tmp_path: Path
) -> None:
    """Both have an orthonormal B and orthogonal rows in A, but only LoRA-XS' are W0's own."""
    model = pico if kind == "llama" else pico_gpt2
    changes = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if kind == "gpt2" else {}
    extracted = lose_cores(save_latent(model, tmp_path / "extracted", "lora-xs", **changes))
    with pytest.raises(InputError, match="extracted by an SVD, pass --model to show it"):
        run(tmp_path / "out", extracted)
    assert run(tmp_path / "out", extracted, model=str(model)).adapters[0].format == "peft-lora"
    tensors = tensors_of(extracted)
    weights = safetensors.torch.load_file(model / "model.safetensors")
    for name in [n for n in tensors if n.endswith("lora_B.weight")]:
        stored = weights[name.removeprefix(PREFIX).replace(".lora_B", "")]
        u, s, vt = torch.linalg.svd(stored.t() if kind == "gpt2" else stored, full_matrices=False)
        tensors[name] = u[:, :4].contiguous()
        tensors[name.replace("lora_B", "lora_A")] = (s[:4, None] * vt[:4]).contiguous()
    rewrite(extracted, tensors)
    with pytest.raises(InputError, match="a lora-xs checkpoint that has lost its cores"):
        run(tmp_path / "again", extracted, model=str(model))
