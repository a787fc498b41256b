"""Adapters put onto a basis that is not theirs: the best core, and the error to the last digit."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import random_adapter, random_basis, reference_logits
from foreign import (
    PREFIX,
    TOKENS,
    dense,
    lora_config,
    peft_logits,
    rewrite,
    save_latent,
    save_peft,
    tensors_of,
)
from pico import make_pico

from lorasb_runtime.errors import BasisMismatchError, InputError, TooLargeError
from lorasb_runtime.importing.foreign import Factors, ForeignAdapter
from lorasb_runtime.importing.rebase import rebase_all
from lorasb_runtime.importing.run import ImportConfig, Imported, import_checkpoints
from lorasb_runtime.storage.adapter_file import load_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis
from lorasb_runtime.types import TargetModule

Q = "model.layers.0.self_attn.q_proj"
PATTERN = "q_proj|v_proj|down_proj"


def run(folder: Path, basis: Basis, output: Path, **config: Any) -> Imported:
    path = output.parent / "given.safetensors"
    save_basis(basis, path)
    result = import_checkpoints([folder], ImportConfig(basis=path, **config), output)
    assert result.basis_file is None and not (output / "basis.safetensors").exists()
    return result.adapters[0]


def spanning(basis: Basis, folder: Path, *, more: int) -> Basis:
    """A basis whose first directions are the checkpoint's, with `more` random ones, mixed up."""
    targets, tensors = [], {}
    for target in basis.targets:
        a = tensors_of(folder)[f"{PREFIX}{target.module}.lora_A.weight"].double()
        b = tensors_of(folder)[f"{PREFIX}{target.module}.lora_B.weight"].double()
        rank = a.shape[0] + more
        wide_a = torch.cat([a, torch.randn(more, a.shape[1], dtype=torch.float64)])
        wide_b = torch.cat([b, torch.randn(b.shape[0], more, dtype=torch.float64)], dim=1)
        noise = torch.randn(rank, rank, dtype=torch.float64)
        mix = torch.eye(rank, dtype=torch.float64) + 0.3 * noise / noise.norm(2)
        tensors[f"{target.module}.A"] = (mix @ wide_a).float()
        tensors[f"{target.module}.B"] = (wide_b @ mix).float()
        targets.append(dataclasses.replace(target, rank=rank))
    return dataclasses.replace(basis, targets=tuple(targets), tensors=tensors)


@pytest.fixture(scope="module")
def basis(pico: Path) -> Basis:
    return random_basis(pico, rank=5, scaling=0.5, pattern=PATTERN)


@pytest.mark.parametrize("kind", ["latent", "lora"])
def test_a_basis_that_spans_the_checkpoint_takes_it_exactly(
    kind: str, pico: Path, basis: Basis, tmp_path: Path
) -> None:
    """Though its pairs are neither orthonormal nor the checkpoint's, and its scaling another."""
    torch.manual_seed(0)
    if kind == "latent":
        folder = save_latent(pico, tmp_path / "a", "lora-xs", lora_alpha=8)
    else:
        folder = save_peft(pico, tmp_path / "a", lora_config())
    wide = spanning(basis, folder, more=3)
    imported = run(folder, wide, tmp_path / "out")
    assert imported.total is not None and imported.total.relative_error < 1e-5
    adapter = load_adapter(tmp_path / "out" / "a.safetensors", wide)
    for index, target in enumerate(wide.targets):
        core = wide.core(adapter.cores, index).double()
        b, a = wide.b(target.module).double(), wide.a(target.module).double()
        expected = dense(folder, target.module, 2.0)
        assert (0.5 * b @ core @ a - expected).norm() < 1e-5 * expected.norm()
    if kind == "lora":
        found, expected = reference_logits(pico, wide, adapter, TOKENS), peft_logits(pico, folder)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("rows", [1.0, 30.0])
def test_the_error_is_that_of_the_dense_delta(
    rows: float, pico: Path, basis: Basis, tmp_path: Path
) -> None:
    """On orthonormal pairs and on such as LoRA-XS has, whose rows have many lengths."""
    lengths = torch.logspace(0, torch.tensor(rows).log10().item(), 5)[:, None]
    tensors = {n: t * lengths if n.endswith(".A") else t for n, t in basis.tensors.items()}
    skewed = dataclasses.replace(basis, tensors=tensors)
    folder = save_peft(pico, tmp_path / "a", lora_config(rank_pattern={"q_proj": 7}))
    imported = run(folder, skewed, tmp_path / "out", max_error=1.0)
    assert imported.fits is not None and imported.total is not None
    wrong = total = 0.0
    for index, target in enumerate(skewed.targets):
        a, b = skewed.a(target.module).double(), skewed.b(target.module).double()
        core = skewed.core(imported.adapter.cores, index).double()
        delta = dense(folder, target.module, 8 / (7 if "q_proj" in target.module else 4))
        missed = delta - 0.5 * b @ core @ a
        fit = imported.fits[target.module]
        assert fit.delta == pytest.approx(delta.square().sum().item(), rel=1e-12)
        assert fit.error == pytest.approx(missed.square().sum().item(), rel=1e-9)
        # the best core: what is missed is orthogonal to all that the pair can express
        assert (b.t() @ missed @ a.t()).abs().max() < 1e-5 * delta.norm() * rows**2
        wrong, total = wrong + fit.error, total + fit.delta
    assert imported.total.relative_error == pytest.approx((wrong / total) ** 0.5)
    assert imported.adapter.info["imported"]["relative_error"] == imported.total.relative_error


@pytest.mark.parametrize("share", [1e-3, 1e-6, 1e-9, 1e-12])
def test_a_tiny_error_does_not_drown_in_cancellation(share: float) -> None:
    """|delta|^2 - |core|^2 would have no digit left of it below 1e-8."""
    q_b = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64)).Q
    q_a = torch.linalg.qr(torch.randn(30, 6, dtype=torch.float64)).Q
    inside = Factors(q_b[:, :5], q_a[:, :5].t(), torch.randn(5, 5, dtype=torch.float64))
    core = torch.block_diag(inside.core, torch.tensor([[share]], dtype=torch.float64))
    whole = Factors(q_b, q_a.t(), core)
    found = whole.project(q_b[:, :5], q_a[:, :5])
    assert found.residual == pytest.approx(share, rel=1e-2 if share < 1e-11 else 1e-5)
    assert found.norm == pytest.approx(core.norm().item(), rel=1e-12)


def test_directions_that_are_rounding_are_not_blown_up() -> None:
    """A basis of which two rows of A are the same but for their last bits."""
    b = torch.linalg.qr(torch.randn(20, 3)).Q.contiguous()
    a = torch.linalg.qr(torch.randn(16, 3)).Q.t().contiguous()
    a[2] = a[1] * (1 + 2e-7)
    target = TargetModule("m", 3, 16, 20)
    basis = Basis((target,), {"m.A": a, "m.B": b}, "imported")
    delta = Factors(torch.randn(20, 2), torch.randn(2, 16))
    (result,) = rebase_all([ForeignAdapter("x", "y", {"m": delta})], basis)
    assert result.cores.abs().max() < 100


def test_more_than_the_limit_is_refused_and_nothing_written(
    pico: Path, basis: Basis, tmp_path: Path
) -> None:
    folder = save_peft(pico, tmp_path / "a", lora_config())
    message = r"a: found a relative error of 0\.9\d+ on this basis, expected at most 0\.5"
    with pytest.raises(TooLargeError, match=message):
        run(folder, basis, tmp_path / "out")
    with pytest.raises(TooLargeError, match=r"at most 0\.9 \(--max-error\); worst: model\."):
        run(folder, basis, tmp_path / "out", max_error=0.9)
    assert not (tmp_path / "out").exists()
    assert run(folder, basis, tmp_path / "out", max_error=0.999).file.is_file()


def test_modules_that_are_no_targets_count_as_lost(pico: Path, tmp_path: Path) -> None:
    narrow = random_basis(pico, rank=4, pattern="q_proj")
    folder = save_peft(pico, tmp_path / "a", lora_config())
    with pytest.raises(TooLargeError, match="4 of its modules are no targets, such as model"):
        run(folder, spanning(narrow, folder, more=0), tmp_path / "out")
    imported = run(folder, spanning(narrow, folder, more=0), tmp_path / "out", max_error=1.0)
    assert imported.fits is not None
    lost = {name for name, fit in imported.fits.items() if fit.relative_error == 1.0}
    assert lost == {name for name in imported.fits if "q_proj" not in name} and len(lost) == 4
    other = random_basis(pico, rank=4, pattern="k_proj")
    with pytest.raises(BasisMismatchError, match=r"no target of the basis among its modules"):
        run(folder, other, tmp_path / "other", max_error=1.0)


def test_the_model_of_the_basis_is_checked(pico: Path, basis: Basis, tmp_path: Path) -> None:
    folder = save_peft(pico, tmp_path / "a", lora_config())
    again = make_pico("llama", tmp_path / "again", seed=1)
    with pytest.raises(
        BasisMismatchError, match=r"found a basis for the model .* expected one for"
    ):
        run(folder, basis, tmp_path / "out", max_error=1.0, model=str(again))
    wide = make_pico("llama", tmp_path / "wide", intermediate_size=96)
    with pytest.raises(BasisMismatchError, match=r"down_proj of shape .* expected the basis'"):
        run(folder, random_basis(wide, 4, pattern=PATTERN), tmp_path / "out", max_error=1.0)
    imported = run(folder, basis, tmp_path / "out", max_error=1.0, model=str(pico))
    assert imported.adapter.base_model == basis.base_model


def test_several_loras_without_a_basis_are_told_the_ways(pico: Path, tmp_path: Path) -> None:
    folders = [save_peft(pico, tmp_path / name, lora_config(), i) for i, name in enumerate("ab")]
    message = r"found 2 checkpoints with a basis of their own, expected one; .*`lorasb compress`"
    with pytest.raises(InputError, match=message):
        import_checkpoints(folders, ImportConfig(), tmp_path / "out")
    path = tmp_path / "basis.safetensors"
    save_basis(random_basis(pico, rank=16, pattern=PATTERN), path)
    result = import_checkpoints(folders, ImportConfig(basis=path, max_error=1.0), tmp_path / "out")
    assert [a.adapter.name for a in result.adapters] == ["a", "b"]
    assert not torch.equal(result.adapters[0].adapter.cores, result.adapters[1].adapter.cores)


def test_an_adapter_of_zeros_has_no_error(pico: Path, basis: Basis, tmp_path: Path) -> None:
    folder = save_peft(pico, tmp_path / "a", lora_config())
    rewrite(folder, {n: t * ("lora_B" not in n) for n, t in tensors_of(folder).items()})
    imported = run(folder, basis, tmp_path / "out")
    assert imported.total is not None and imported.total.relative_error == 0.0
    assert not imported.adapter.cores.any()
    assert random_adapter(basis, 0).cores.shape == imported.adapter.cores.shape
