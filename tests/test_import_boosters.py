"""XGBLoRA's sequences of rank-1 LoRAs: their sum, and every prefix of it, on one basis."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import dense, lora_config, save_peft, set_config
from pico import make_pico

from lorasb_runtime.errors import FileFormatError, InputError
from lorasb_runtime.importing.run import ImportConfig, ImportResult, import_checkpoints

COUNT = 12
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def run(folder: Path, output: Path, **config: Any) -> ImportResult:
    return import_checkpoints([folder], ImportConfig(boosters=True, **config), output)


def targets_of(step: int) -> list[str]:
    """Each booster trains some of the layers only."""
    return [Q] if step % 3 == 0 else [Q, V]


@pytest.fixture(scope="module")
def sequence(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve boosters in folders step-0 to step-11, which sort otherwise as words."""
    folder = tmp_path_factory.mktemp("boosted") / "alice"
    for step in range(COUNT):
        config = lora_config(r=1, lora_alpha=step + 1, target_modules=targets_of(step))
        save_peft(pico, folder / f"step-{step}", config, seed=step)
    return folder


def expected(sequence: Path, module: str, count: int) -> torch.Tensor:
    """The sum of the first `count` deltas."""
    steps = [step for step in range(count) if module in targets_of(step)]
    return sum(dense(sequence / f"step-{s}", module, s + 1.0) for s in steps) + torch.zeros(1)


@pytest.mark.parametrize("prefix", [None, 1, 2, 5, COUNT])
def test_a_prefix_is_the_sum_of_the_first_boosters(
    prefix: int | None, sequence: Path, tmp_path: Path
) -> None:
    result = run(sequence, tmp_path / "out", prefix=prefix)
    count = COUNT if prefix is None else prefix
    adapter = result.adapters[0]
    assert (adapter.format, adapter.file.name) == ("xgblora", "alice.safetensors")
    assert adapter.info == {"boosters": [f"step-{i}" for i in range(count)], "of": COUNT}
    assert [t.rank for t in result.basis.targets] == [12, 8]
    for index, target in enumerate(result.basis.targets):
        b, a = result.basis.b(target.module).double(), result.basis.a(target.module).double()
        found = b @ result.basis.core(adapter.adapter.cores, index).double() @ a
        wanted = expected(sequence, target.module, count)
        assert (found - wanted).norm() < 1e-5 * (1 + wanted.norm())


def test_every_prefix_has_the_same_basis(sequence: Path, tmp_path: Path) -> None:
    digests = {
        run(sequence, tmp_path / f"out{prefix}", prefix=prefix).basis.digest
        for prefix in (None, 1, 7)
    }
    assert len(digests) == 1


def test_more_boosters_than_a_weight_has_rows_still_fit(pico: Path, tmp_path: Path) -> None:
    for step in range(20):
        config = lora_config(r=1, lora_alpha=1, target_modules=[V])
        save_peft(pico, tmp_path / "many" / f"{step}", config, seed=step)
    result = run(tmp_path / "many", tmp_path / "out")
    assert [t.rank for t in result.basis.targets] == [16]
    b, a = result.basis.b(V).double(), result.basis.a(V).double()
    found = b @ result.adapters[0].adapter.cores.view(16, 16).double() @ a
    wanted = sum(dense(tmp_path / "many" / str(step), V) for step in range(20))
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "prefix", "message"),
    [
        (lambda f: None, 13, "prefix: found 13, expected 1 to 12 boosters"),
        (lambda f: f.joinpath("step-3").rename(f / "last"), None, "last: found no number at the"),
        (lambda f: shutil.copytree(f / "step-3", f / "again-03"), None, "the number of again-03"),
        (lambda f: set_config(f / "step-3", use_dora=True), None, "step-3.*found use_dora"),
        (lambda f: [shutil.rmtree(p) for p in f.iterdir()], None, "found no folder with adapter_"),
    ],
)
def test_wrong_sequences_are_refused(
    change: Any, prefix: int | None, message: str, sequence: Path, tmp_path: Path
) -> None:
    shutil.copytree(sequence, tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(InputError, match=message):
        run(tmp_path / "copy", tmp_path / "out", prefix=prefix)


def test_boosters_of_two_models_are_refused(sequence: Path, tmp_path: Path) -> None:
    shutil.copytree(sequence, tmp_path / "copy")
    wide = make_pico("llama", tmp_path / "wide", hidden_size=64)
    save_peft(wide, tmp_path / "copy" / "x99", lora_config(r=1, target_modules=[Q]))
    with pytest.raises(FileFormatError, match=r"q_proj of shapes .*, expected one shape in all"):
        run(tmp_path / "copy", tmp_path / "out")
