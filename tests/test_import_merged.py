"""Whole models that were made from MODEL: their deltas by truncated SVD, or onto a basis."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from bases import random_adapter, random_basis, reference_logits
from foreign import TOKENS, lora_config, peft_model
from pico import make_pico

from lorasb_runtime.errors import FileFormatError, InputError, TooLargeError
from lorasb_runtime.importing.run import ImportConfig, Imported, ImportResult, import_checkpoints
from lorasb_runtime.models.load import load_causal_lm
from lorasb_runtime.storage.basis_file import load_basis, save_basis
from lorasb_runtime.storage.checkpoint import INDEX, SINGLE

Q = "model.layers.0.self_attn.q_proj"


def run(folder: Path, model: Path, output: Path, **config: Any) -> ImportResult:
    settings = ImportConfig(str(model), from_merged=True, **config)
    return import_checkpoints([folder], settings, output)


def adapter_of(result: ImportResult) -> Imported:
    (imported,) = result.adapters
    assert imported.total is not None
    return imported


@pytest.fixture(scope="module")
def merged(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's merge of a rank-4 LoRA on q_proj, v_proj and down_proj."""
    folder = tmp_path_factory.mktemp("models") / "tuned"
    peft_model(pico, lora_config()).merge_and_unload().save_pretrained(folder)
    return folder


def change(folder: Path, copy: Path, **tensors: torch.Tensor) -> Path:
    """A copy of a model folder with other tensors in it; __ stands for a dot."""
    copy.mkdir()
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    found = safetensors.torch.load_file(folder / SINGLE)
    found.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})
    safetensors.torch.save_file(found, copy / SINGLE, {"format": "pt"})
    return copy


def test_a_merged_lora_comes_back_whole(pico: Path, merged: Path, tmp_path: Path) -> None:
    result = run(merged, pico, tmp_path / "out", rank=4)
    imported = adapter_of(result)
    assert imported.total.relative_error < 1e-5
    assert {t.module.rpartition(".")[2] for t in result.basis.targets} == {
        "q_proj",
        "v_proj",
        "down_proj",
    }
    assert imported.info == {"left_out": {"tensors": [], "norm": 0.0}, "added": []}
    found = reference_logits(pico, result.basis, imported.adapter, TOKENS)
    expected = reference_logits(merged, result.basis, None, TOKENS)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert load_basis(tmp_path / "out" / "basis.safetensors").base_model == result.basis.base_model


def test_what_the_rank_cuts_off_is_in_the_error(pico: Path, merged: Path, tmp_path: Path) -> None:
    imported = adapter_of(run(merged, pico, tmp_path / "out", rank=3))
    before, after = (safetensors.torch.load_file(f / SINGLE) for f in (pico, merged))
    lost = total = 0.0
    for module, fit in (imported.fits or {}).items():
        delta = (after[f"{module}.weight"] - before[f"{module}.weight"]).double()
        values = torch.linalg.svdvals(delta)
        assert fit.relative_error == pytest.approx((values[3] / values.norm()).item(), rel=1e-3)
        lost, total = lost + values[3].item() ** 2, total + values.square().sum().item()
    assert imported.total.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    with pytest.raises(TooLargeError, match=r"expected at most 0\.01"):
        run(merged, pico, tmp_path / "no", rank=3, max_error=0.01)


def test_a_basis_takes_the_delta_that_was_merged_from_it(pico: Path, tmp_path: Path) -> None:
    basis = random_basis(pico, rank=3, scaling=0.5)
    adapter = random_adapter(basis, 0)
    model = load_causal_lm(pico)
    for index, target in enumerate(basis.targets):
        core = basis.core(adapter.cores, index)
        delta = 0.5 * basis.b(target.module) @ core @ basis.a(target.module)
        model.get_submodule(target.module).weight.add_(delta)
    model.save_pretrained(tmp_path / "tuned")
    save_basis(basis, tmp_path / "basis.safetensors")
    result = run(tmp_path / "tuned", pico, tmp_path / "out", basis=tmp_path / "basis.safetensors")
    imported = adapter_of(result)
    assert imported.total.relative_error < 1e-5
    assert torch.allclose(imported.adapter.cores, adapter.cores, atol=1e-4)


def test_conv1d_weights_are_taken_the_right_way_round(pico_gpt2: Path, tmp_path: Path) -> None:
    config = lora_config(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    peft_model(pico_gpt2, config).merge_and_unload().save_pretrained(tmp_path / "tuned")
    result = run(tmp_path / "tuned", pico_gpt2, tmp_path / "out", rank=4)
    assert all(target.transposed for target in result.basis.targets)
    found = reference_logits(pico_gpt2, result.basis, adapter_of(result).adapter, TOKENS)
    expected = reference_logits(tmp_path / "tuned", result.basis, None, TOKENS)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_shards_and_dtypes_may_differ(pico: Path, merged: Path, tmp_path: Path) -> None:
    """A module that is the same but for its dtype has no delta."""
    model = load_causal_lm(merged)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / INDEX).is_file()
    whole = adapter_of(run(merged, pico, tmp_path / "whole", rank=4)).adapter
    parts = adapter_of(run(tmp_path / "sharded", pico, tmp_path / "parts", rank=4)).adapter
    assert torch.equal(whole.cores, parts.cores)
    half = load_causal_lm(pico).bfloat16()
    half.save_pretrained(tmp_path / "half")
    wide = {n: t.float() for n, t in half.state_dict().items()}
    again = change(pico, tmp_path / "again", **wide)
    with pytest.raises(InputError, match="found the linear layers of half unchanged"):
        run(again, tmp_path / "half", tmp_path / "out", rank=1)


def test_what_no_adapter_can_hold_is_told(pico: Path, merged: Path, tmp_path: Path) -> None:
    norm = torch.full((32,), 3.0)
    before = safetensors.torch.load_file(pico / SINGLE)["model.norm.weight"]
    tuned = change(merged, tmp_path / "t", model__norm__weight=norm, extra__thing=torch.ones(2))
    info = adapter_of(run(tuned, pico, tmp_path / "out", rank=4)).info
    assert info["left_out"]["tensors"] == ["model.norm.weight"]
    assert info["left_out"]["norm"] == pytest.approx((norm - before).norm().item(), rel=1e-6)
    assert info["added"] == ["extra.thing"]


def test_another_architecture_is_refused(pico: Path, merged: Path, tmp_path: Path) -> None:
    wide = make_pico("llama", tmp_path / "wide", intermediate_size=96)
    with pytest.raises(FileFormatError, match=r"shape \[.*\] for model.* as in .*wide"):
        run(merged, wide, tmp_path / "out", rank=4)
    deep = make_pico("llama", tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(FileFormatError, match=r"no such tensor for model\.layers\.2"):
        run(merged, deep, tmp_path / "out", rank=4)
    with pytest.raises(InputError, match="found the linear layers of pico unchanged"):
        run(pico, pico, tmp_path / "out", rank=4)
    quantized = change(merged, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="found a quantized model, expected plain weights"):
        run(quantized, pico, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (SINGLE, b"", "without a safetensors header"),
        (SINGLE, b"\x02\0\0\0\0\0\0\0[]", "a header that is no JSON object"),
        (SINGLE, b'\x0a\0\0\0\0\0\0\0{"a": {} }', "found a with {}"),
        (INDEX, b'{"weight_map": {"a": ["x"]}}', "found no shard"),
        (INDEX, b'{"weight_map": {"a": "../model.safetensors"}}', "found no shard"),
        (INDEX, b'{"weight_map": 5}', "found no weight_map"),
        ("config.json", b"[" * 99999, "nested too deeply"),
    ],
)
def test_a_hostile_model_folder_is_refused(
    name: str, content: bytes, message: str, pico: Path, merged: Path, tmp_path: Path
) -> None:
    folder = change(merged, tmp_path / "bad")
    (folder / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=message):
        run(folder, pico, tmp_path / "out", rank=4)
