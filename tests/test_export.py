"""Adapters in the formats of other programs: the same logits there, and the way back."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from bases import random_adapter, random_basis, reference_logits
from conftest import Run
from foreign import CONFIG, PREFIX, TOKENS, WEIGHTS, peft_logits, tensors_of
from pico import make_pico

from lorasb_runtime.importing.run import ImportConfig, import_checkpoints
from lorasb_runtime.storage.adapter_file import Adapter, save_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis
from lorasb_runtime.types import TargetModule

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def export(command: Run) -> Run:
    """Runs `lorasb export ...`."""
    return partial(command, "export")


def mixed_basis(model: Path) -> Basis:
    """A scaling, and ranks that differ from module to module."""
    basis = random_basis(model, rank=6, scaling=0.5)
    targets, tensors = [], {}
    for index, t in enumerate(basis.targets):
        rank = 6 - index % 3
        targets.append(TargetModule(t.module, rank, t.in_features, t.out_features, t.transposed))
        tensors[f"{t.module}.A"] = basis.a(t.module)[:rank].contiguous()
        tensors[f"{t.module}.B"] = basis.b(t.module)[:, :rank].contiguous()
    return Basis(tuple(targets), tensors, "lora-sb", 0.5, basis.base_model)


def save(basis: Basis, folder: Path) -> Adapter:
    save_basis(basis, folder / "basis.safetensors")
    return save_adapter(random_adapter(basis, 0, name="alice"), folder / "alice.safetensors")


def words(folder: Path, *more: object) -> tuple[object, ...]:
    return (folder / "alice.safetensors", "--basis", folder / "basis.safetensors", *more)


@pytest.mark.parametrize("flags", [(), ("--keep-ranks",)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_gives_the_same_logits(
    kind: str, flags: tuple[str, ...], pico: Path, pico_gpt2: Path, export: Run, tmp_path: Path
) -> None:
    model = pico if kind == "llama" else pico_gpt2
    basis = mixed_basis(model)
    adapter = save(basis, tmp_path)
    output = tmp_path / "lora"
    status, out, err = export(*words(tmp_path, "--model", model, "-o", output, *flags))
    assert status == 0, err
    assert "vLLM: --max-lora-rank 8" in out
    expected = reference_logits(model, basis, adapter, TOKENS)
    found = peft_logits(model, output)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    config = json.loads((output / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(model)
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    ranks = {len(t) for name, t in tensors_of(output).items() if "lora_A" in name}
    assert ranks == ({4, 5, 6} if flags else {6})


def test_every_reader_scales_by_one(pico: Path, export: Run, tmp_path: Path) -> None:
    """PEFT and vLLM by their patterns, llama.cpp by one alpha over each tensor's own rank."""
    save(mixed_basis(pico), tmp_path)
    export(*words(tmp_path, "-o", tmp_path / "padded"))
    config = json.loads((tmp_path / "padded" / CONFIG).read_text())
    for name, tensor in tensors_of(tmp_path / "padded").items():
        if "lora_A" in name:
            assert config["lora_alpha"] / tensor.shape[0] == 1
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["base_model_name_or_path"] == "pico"
    modules = {
        name.removeprefix(PREFIX).rpartition(".lora_")[0]
        for name in tensors_of(tmp_path / "padded")
    }
    assert set(config["target_modules"]) == modules
    assert {"r", "lora_alpha", "target_modules", "bias", "use_dora"} <= config.keys()


@pytest.mark.parametrize("flags", [(), ("--keep-ranks",)])
def test_an_export_comes_back_to_the_same_cores(
    flags: tuple[str, ...], pico: Path, export: Run, tmp_path: Path
) -> None:
    basis = mixed_basis(pico)
    adapter = save(basis, tmp_path)
    export(*words(tmp_path, "-o", tmp_path / "lora", *flags))
    config = ImportConfig(str(pico), tmp_path / "basis.safetensors")
    result = import_checkpoints([tmp_path / "lora"], config, tmp_path / "back")
    back = result.adapters[0]
    assert back.total is not None and back.total.relative_error < 1e-6
    assert torch.allclose(back.adapter.cores, adapter.cores, rtol=0, atol=1e-6)
    assert back.adapter.basis == adapter.basis


def test_an_export_with_orthonormal_factors_comes_back_too(
    pico: Path, export: Run, tmp_path: Path
) -> None:
    """With cores that are the identity it looks like a checkpoint that lost its cores."""
    basis = random_basis(pico, rank=3)
    save_basis(basis, tmp_path / "basis.safetensors")
    cores = torch.cat([torch.eye(3).flatten() for _ in basis.targets])
    save_adapter(Adapter(cores, basis.digest), tmp_path / "alice.safetensors")
    export(*words(tmp_path, "-o", tmp_path / "lora"))
    result = import_checkpoints([tmp_path / "lora"], ImportConfig(), tmp_path / "back")
    assert torch.allclose(
        result.adapters[0].adapter.cores.abs().sum(), torch.tensor(3.0 * 14), atol=1e-3
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_factors_and_deltas_hold_the_scaled_delta(
    dtype: str, pico_gpt2: Path, export: Run, tmp_path: Path
) -> None:
    basis = mixed_basis(pico_gpt2)
    adapter = save(basis, tmp_path)
    for kind in ("factors", "delta"):
        flags = ("--format", kind, "--dtype", dtype, "-o", tmp_path / kind)
        status, _, err = export(*words(tmp_path, *flags))
        assert status == 0, err
    factors, deltas = (safetensors.torch.load_file(tmp_path / k) for k in ("factors", "delta"))
    assert {t.dtype for t in (*factors.values(), *deltas.values())} == {getattr(torch, dtype)}
    assert len(factors) == 3 * len(basis.targets) and len(deltas) == len(basis.targets)
    error = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    for index, target in enumerate(basis.targets):
        b, a = basis.b(target.module).double(), basis.a(target.module).double()
        expected = 0.5 * b @ basis.core(adapter.cores, index).double() @ a
        parts = [factors[f"{target.module}.{part}"].double() for part in "BRA"]
        assert (parts[0] @ parts[1] @ parts[2] - expected).norm() < error * expected.norm()
        stored = deltas[f"{target.module}.weight"].double()
        assert (stored.t() - expected).norm() < error * expected.norm()  # Conv1D: [in, out]
    header = safetensors.safe_open(tmp_path / "delta", "pt").metadata()
    assert (header["lorasb.adapter"], header["lorasb.basis"]) == (adapter.version, basis.digest)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-o", "x", "--format", "gguf"], "format: found 'gguf', expected one of peft, factors"),
        (["-o", "x", "--format", "delta", "--keep-ranks"], "--keep-ranks goes with --format peft"),
        (["-o", "x", "--dtype", "int8"], "dtype: found 'int8'"),
        (["-o", "used"], "used: already exists; choose another output or pass --force"),
        (["-o", "used", "--force"], "used: found diary in it, expected nothing but adapter_config"),
        (["-o", ".", "--force"], "expected nothing but adapter_config.json"),
        (["-o", "alice.safetensors", "--force"], "something other than a folder"),
        (["-o", "alice.safetensors", "--format", "delta"], "alice.safetensors: already exists"),
        (["-o", "used", "--format", "factors", "--force"], "found a folder, expected the file"),
        (["-o", "x", "--model", "other"], "found a basis for the model"),
        (["-o", "x", "--dtype", "float16"], "found numbers that do not fit float16"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    more: list[str],
    message: str,
    pico: Path,
    export: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    basis = random_basis(pico, rank=3)
    save_basis(basis, tmp_path / "basis.safetensors")
    adapter = random_adapter(basis, 0, strength=1e9)
    save_adapter(adapter, tmp_path / "alice.safetensors")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "diary").write_text("dear diary")
    make_pico("llama", tmp_path / "other", seed=9)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = export(*words(tmp_path, *more))
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_force_replaces_an_earlier_export(pico: Path, export: Run, tmp_path: Path) -> None:
    save(random_basis(pico, rank=3), tmp_path)
    flags: tuple[Any, ...] = ("-o", tmp_path / "lora")
    assert export(*words(tmp_path, *flags))[0] == 0
    (tmp_path / "lora" / WEIGHTS).write_bytes(b"old")
    assert export(*words(tmp_path, *flags, "--force"))[0] == 0
    assert tensors_of(tmp_path / "lora")
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [CONFIG, WEIGHTS]
    flags = ("-o", tmp_path / "d", "--format", "delta", "--json")
    assert export(*words(tmp_path, *flags))[0] == 0
    status, out, _ = export(*words(tmp_path, *flags, "--force"))
    assert (status, json.loads(out)["format"]) == (0, "delta")
