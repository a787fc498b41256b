"""PEFT's adapters imported without a basis: the same logits as PEFT gives, in every variant."""

from pathlib import Path

import pytest
import torch
from foreign import (
    PREFIX,
    dense,
    lora_config,
    rewrite,
    save_peft,
    set_config,
    tensors_of,
)
from imports import check_logits, import_one
from peft import LoraConfig, VeloraConfig
from pico import make_pico

from lorasb_runtime.errors import InputError
from lorasb_runtime.storage.basis_file import load_basis

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


LORAS: dict[str, LoraConfig] = {
    "plain": lora_config(),
    "all": lora_config(target_modules="all-linear"),
    "head": lora_config(target_modules=["lm_head", "q_proj"]),
    "wide": lora_config(r=24),  # above the smaller side of v_proj
    # GeLoRA: a rank for each layer, by names and by expressions; the first that matches wins
    "gelora": lora_config(
        rank_pattern={Q: 2, r"layers\.\d+\.self_attn\.v_proj": 3, "v_proj": 1, "down_proj": 6},
        alpha_pattern={"layers.1.self_attn.q_proj": 32, "(q|v)_proj": 1, "down_proj": 3},
    ),
    # LoRA-Pro: alpha / sqrt(r)
    "rslora": lora_config(use_rslora=True, lora_alpha=5, rank_pattern={"q_proj": 7}),
    "velora": lora_config(velora_config=VeloraConfig()),
    "mica": lora_config(init_lora_weights="mica"),
    "gaussian": lora_config(init_lora_weights="gaussian", lora_dropout=0.3),
}


@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_gives_pefts_logits(kind: str, pico: Path, tmp_path: Path) -> None:
    folder = save_peft(pico, tmp_path / kind, LORAS[kind])
    imported = check_logits(pico, folder, tmp_path / "out", model=kind == "head")
    assert imported.format == "peft-lora"
    assert imported.total is not None and imported.total.relative_error < 1e-6


def test_a_lora_of_conv1d_layers_gives_pefts_logits(pico_gpt2: Path, tmp_path: Path) -> None:
    config = lora_config(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    folder = save_peft(pico_gpt2, tmp_path / "gpt2", config)
    for out, model in (("alone", False), ("with", True)):
        check_logits(pico_gpt2, folder, tmp_path / out, model=model)
        targets = load_basis(tmp_path / out / "basis.safetensors").targets
        assert targets and all(target.transposed for target in targets)


def test_the_model_says_what_is_transposed(pico_gpt2: Path, tmp_path: Path) -> None:
    """PEFT keeps one flag for a mix of Conv1D and Linear; the square c_proj cannot tell."""
    config = lora_config(target_modules=["c_attn", "c_proj", "lm_head"], fan_in_fan_out=True)
    folder = save_peft(pico_gpt2, tmp_path / "mixed", config)
    set_config(folder, fan_in_fan_out=False)
    import_one(folder, tmp_path / "out", model=pico_gpt2)
    targets = load_basis(tmp_path / "out" / "basis.safetensors").targets
    assert {t.module for t in targets if not t.transposed} == {"lm_head"}


def test_the_basis_is_orthonormal_and_says_what_it_is(pico: Path, tmp_path: Path) -> None:
    folder = save_peft(pico, tmp_path / "alice", LORAS["wide"])
    result = import_one(folder, tmp_path / "out", model=pico)
    basis = load_basis(tmp_path / "out" / "basis.safetensors")
    ranks = {t.module.rpartition(".")[2]: t.rank for t in basis.targets}
    assert ranks == {"q_proj": 24, "v_proj": 16, "down_proj": 24}
    for target in basis.targets:
        a, b = basis.a(target.module), basis.b(target.module)
        for gram in (a @ a.t(), b.t() @ b):
            assert torch.allclose(gram, torch.eye(target.rank), atol=1e-6)
    assert (basis.method, basis.scaling) == ("imported", 1.0)
    assert basis.base_model is not None and basis.base_model.fingerprint is not None
    adapter = result.adapters[0].adapter
    assert (adapter.name, adapter.base_model) == ("alice", basis.base_model)
    assert adapter.info["imported"]["format"] == "peft-lora"
    # neighbours that read the same input, in the model's order
    assert [t.module.rpartition(".")[2] for t in basis.targets[:3]] == [*ranks]


def test_without_a_model_the_name_is_the_checkpoints_and_unverified(
    pico: Path, tmp_path: Path
) -> None:
    folder = save_peft(pico, tmp_path / "alice", lora_config())
    for stated, name in (("org/model", "org/model"), ("/home/me/models/x/", "x"), (None, None)):
        set_config(folder, base_model_name_or_path=stated)
        basis = import_one(folder, tmp_path / f"out-{name}".replace("/", "-")).basis
        found = basis.base_model
        assert (found.name if found else None) == name
        assert found is None or found.fingerprint is None


def test_a_live_state_dicts_names_are_read_too(pico: Path, tmp_path: Path) -> None:
    folder = save_peft(pico, tmp_path / "alice", lora_config())
    saved = import_one(folder, tmp_path / "saved").adapters[0].adapter
    live = {n.replace(".weight", ".bob.weight"): t for n, t in tensors_of(folder).items()}
    rewrite(folder, live)
    assert torch.equal(import_one(folder, tmp_path / "live").adapters[0].adapter.cores, saved.cores)
    rewrite(folder, {n.removeprefix(PREFIX): t for n, t in live.items()})
    assert torch.equal(import_one(folder, tmp_path / "bare").adapters[0].adapter.cores, saved.cores)


def test_a_copy_of_the_output_embedding_must_be_the_models(pico: Path, tmp_path: Path) -> None:
    """PEFT writes one where lm_head is a target, and another where the vocabulary has grown."""
    folder = save_peft(pico, tmp_path / "head", LORAS["head"])
    with pytest.raises(InputError, match=r"lm_head\.base_layer\.weight', a copy .* pass --model"):
        import_one(folder, tmp_path / "out")
    tensors = tensors_of(folder)
    copy = f"{PREFIX}lm_head.base_layer.weight"
    rewrite(folder, {**tensors, copy: tensors[copy] + 1})
    with pytest.raises(InputError, match=r"unlike the weight of pico, expected the base model's"):
        import_one(folder, tmp_path / "out", model=pico)
    tied = make_pico("llama", tmp_path / "tied", tie_word_embeddings=True)
    folder = save_peft(tied, tmp_path / "t", LORAS["head"])
    result = import_one(folder, tmp_path / "out", model=tied)
    index = [target.module for target in result.basis.targets].index("lm_head")
    core = result.basis.core(result.adapters[0].adapter.cores, index)
    found = result.basis.b("lm_head") @ core @ result.basis.a("lm_head")
    assert torch.allclose(found.double(), dense(folder, "lm_head", 2.0), atol=1e-4)


def test_a_checkpoint_of_another_model_is_refused(pico: Path, tmp_path: Path) -> None:
    folder = save_peft(pico, tmp_path / "alice", lora_config())
    wide = make_pico("llama", tmp_path / "wide", intermediate_size=96)
    with pytest.raises(InputError, match=r"down_proj of shape \[32, 64\].* model's \[32, 96\]"):
        import_one(folder, tmp_path / "out", model=wide)
    shallow = make_pico("llama", tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(InputError, match=r"model\.layers\.1\..*, which is no linear layer of"):
        import_one(folder, tmp_path / "out", model=shallow)
    assert not (tmp_path / "out").exists()
