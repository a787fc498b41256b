"""`lorasb import` from the command line: what it writes, what it says, what it leaves behind."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from bases import random_basis
from conftest import Run
from foreign import lora_config, peft_model, save_latent, save_peft, set_config

from lorasb_runtime.storage.adapter_file import load_adapter
from lorasb_runtime.storage.basis_file import load_basis, save_basis

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def import_(command: Run) -> Run:
    """Runs `lorasb import ...`."""
    return partial(command, "import")


def test_it_writes_the_basis_and_an_adapter_for_each(
    pico: Path, import_: Run, tmp_path: Path
) -> None:
    folders = [save_latent(pico, tmp_path / name, seed=i) for i, name in enumerate("ab")]
    status, out, err = import_(*folders, "--model", pico, "-o", tmp_path / "out")
    assert status == 0, err
    assert "basis.safetensors: 6 modules, rank 4\n  looks like lora-sb (a guess" in out
    assert out.count("cores as they were") == 2
    basis = load_basis(tmp_path / "out" / "basis.safetensors")
    for name in "ab":
        adapter = load_adapter(tmp_path / "out" / f"{name}.safetensors", basis)
        assert adapter.name == name and adapter.base_model == basis.base_model
        assert f"{name}.safetensors: lora-sb-or-xs, version {adapter.version[:12]}, 96 num" in out


def test_the_error_is_told_by_module_and_in_all(pico: Path, import_: Run, tmp_path: Path) -> None:
    folder = save_peft(pico, tmp_path / "alice", lora_config())
    save_basis(random_basis(pico, rank=16), tmp_path / "wide.safetensors")
    save_basis(random_basis(pico, rank=16, pattern="q_proj"), tmp_path / "narrow.safetensors")
    flags = ("--basis", tmp_path / "wide.safetensors", "-o", tmp_path / "out")
    status, out, err = import_(folder, *flags, "--json")
    assert (status, "warning" in err) == (2, False)
    status, out, err = import_(folder, *flags, "--max-error", 0.99, "--json")
    assert status == 0, err
    (adapter,) = json.loads(out)["adapters"]
    assert len(adapter["modules"]) == 6
    assert 0.7 < adapter["modules"][Q]["relative_error"] < 0.95
    assert adapter["energy_kept"] == pytest.approx(1 - adapter["relative_error"] ** 2)
    flags = ("--basis", tmp_path / "narrow.safetensors", "-o", tmp_path / "narrow")
    status, out, err = import_(folder, *flags, "--max-error", 1)
    assert status == 0
    assert "warning: 4 modules of" in err and "their deltas are lost" in " ".join(err.split())
    assert "  worst: " in out and "1.00e+00" in out


def test_a_tuned_models_other_changes_are_warned_of(
    pico: Path, import_: Run, tmp_path: Path
) -> None:
    model = peft_model(pico, lora_config()).merge_and_unload()
    with torch.no_grad():
        model.model.norm.weight.add_(1)
        model.model.embed_tokens.weight.add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    words = ("--from-merged", "--model", pico, "--rank", 4, "-o", tmp_path / "out")
    status, out, err = import_(tmp_path / "tuned", *words)
    assert status == 0, err
    said = " ".join(err.split())
    assert "differs from the base model in 2 tensors that no adapter can hold" in said
    kept = float(out.partition("% kept")[0].rpartition(" ")[2])
    assert 10 < kept < 100


def test_several_boosters_are_one_adapter(pico: Path, import_: Run, tmp_path: Path) -> None:
    for step in range(3):
        save_peft(pico, tmp_path / "b" / f"step-{step}", lora_config(r=1), seed=step)
    status, _, err = import_(tmp_path / "b", "-o", tmp_path / "out")
    assert (
        status == 2 and "found no checkpoint but folders with one (step-0, step-1, step-2)" in err
    )
    words = ("--boosters", "--prefix", 2, "-o", tmp_path / "out")
    status, out, err = import_(tmp_path / "b", *words)
    assert status == 0, err
    assert "b.safetensors: xgblora" in out


def test_an_output_is_replaced_with_force_alone_and_only_if_it_is_ours(
    pico: Path, import_: Run, tmp_path: Path
) -> None:
    folder = save_peft(pico, tmp_path / "alice", lora_config())
    words = (folder, "-o", tmp_path / "out")
    assert import_(*words)[0] == 0
    status, _, err = import_(*words)
    assert status == 2 and "already exists; choose another output or pass --force" in err
    assert import_(*words, "--force")[0] == 0
    for output, found in ((folder, "adapter_"), (tmp_path, "found ")):
        before = sorted(tmp_path.rglob("*"))
        status, _, err = import_(folder, "-o", output, "--force")
        assert status == 2 and found in err and "expected nothing but *.safetensors" in err
        assert sorted(tmp_path.rglob("*")) == before


def test_a_refusal_is_one_line(pico: Path, import_: Run, tmp_path: Path) -> None:
    folder = save_peft(pico, tmp_path / "alice", lora_config())
    set_config(folder, use_dora=True)
    status, out, err = import_(folder, "-o", tmp_path / "out")
    assert (status, out) == (2, "")
    assert err.startswith("lorasb: error: ") or err.splitlines()[-1].startswith("lorasb: error: ")
    assert "found use_dora, expected none; merge it into its base model with PEFT" in err
