"""`lorasb diff`: adapters, bases and models compared, against full matrices."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import random_adapter, random_basis
from conftest import Run
from safetensors.torch import load_file, save_file

from lorasb_runtime.inspecting.diff_bases import principal_angles
from lorasb_runtime.storage.adapter_file import Adapter, save_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis


@pytest.fixture
def diff(command: Run) -> Run:
    """Runs `lorasb diff ...`."""
    return partial(command, "diff")


@pytest.fixture(scope="module")
def basis(pico: Path) -> Basis:
    """A and B are not orthonormal, and the scaling is not 1."""
    made = random_basis(pico, scaling=0.5)
    generator = torch.Generator().manual_seed(7)
    tensors = {
        n: t * (0.5 + torch.rand(t.shape, generator=generator)) for n, t in made.tensors.items()
    }
    return replace(made, tensors=tensors)


def compare(diff: Run, *words: object) -> dict[str, Any]:
    status, said, errors = diff(*words, "--json")
    assert status == 0, errors
    found: dict[str, Any] = json.loads(said)
    return found


def delta(basis: Basis, adapter: Adapter, index: int) -> torch.Tensor:
    module = basis.targets[index].module
    core = basis.core(adapter.cores, index).double()
    return basis.scaling * (basis.b(module).double() @ core @ basis.a(module).double())


def test_adapters_differ_as_their_deltas_do(diff: Run, basis: Basis, tmp_path: Path) -> None:
    one, other = random_adapter(basis, 1), random_adapter(basis, 2)
    cores = other.cores.clone()
    basis.core(cores, 3).copy_(basis.core(one.cores, 3))
    other = replace(other, cores=cores)
    save_basis(basis, tmp_path / "basis")
    save_adapter(one, tmp_path / "one")
    save_adapter(other, tmp_path / "other")
    told = compare(diff, tmp_path / "one", tmp_path / "other", "--basis", tmp_path / "basis")
    deltas = [
        (delta(basis, one, i).flatten(), delta(basis, other, i).flatten())
        for i in range(len(basis.targets))
    ]
    x, y = (torch.cat([pair[side] for pair in deltas]) for side in (0, 1))
    assert told["distance"] == pytest.approx((x - y).norm().item(), rel=1e-6)
    assert told["norm_a"] == pytest.approx(x.norm().item(), rel=1e-6)
    assert told["cosine"] == pytest.approx((x @ y / x.norm() / y.norm()).item(), rel=1e-6)
    distances = [row["distance"] for row in told["modules"]]
    assert distances == sorted(distances, reverse=True)
    assert told["modules"][-1]["module"] == basis.targets[3].module
    assert (distances[-1], told["modules"][-1]["cosine"]) == (0, pytest.approx(1))
    assert math.fsum(row["share"] for row in told["modules"]) == pytest.approx(1)
    bare = compare(diff, tmp_path / "one", tmp_path / "other")
    apart = (one.cores.double() - other.cores.double()).norm().item()
    assert bare["distance"] == pytest.approx(apart) and bare["modules"] == []
    assert "pass --basis" in bare["of"]
    same = compare(diff, tmp_path / "one", tmp_path / "one")
    assert (same["distance"], same["cosine"]) == (0, pytest.approx(1))
    save_adapter(replace(one, cores=torch.zeros_like(one.cores)), tmp_path / "zero")
    assert compare(diff, tmp_path / "one", tmp_path / "zero")["cosine"] is None


@pytest.mark.parametrize("angle", [0.0, 1e-11, 1e-4, 0.7, 1.5, math.pi / 2])
def test_principal_angles_are_exact_from_the_smallest_to_the_largest(angle: float) -> None:
    """Turn one of three orthonormal columns out of their span by a known angle."""
    generator = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.randn(9, 4, generator=generator, dtype=torch.float64)).Q
    turned = torch.cat([q[:, :2], math.cos(angle) * q[:, 2:3] + math.sin(angle) * q[:, 3:]], dim=1)
    mixed = turned @ torch.randn(3, 3, generator=generator, dtype=torch.float64)
    found = principal_angles(q[:, :3], mixed)
    assert found[-1].item() == pytest.approx(angle, rel=1e-6, abs=1e-14)
    assert found[:2].max() < 1e-14
    assert principal_angles(q[:, :1], mixed).shape == (1,)


def test_bases_differ_by_the_angles_between_their_subspaces(
    diff: Run, basis: Basis, pico: Path, tmp_path: Path
) -> None:
    """One module's B spans the same, another's A is turned whole, a third one is missing."""
    tensors = dict(basis.tensors)
    first, second, third = (t.module for t in basis.targets[:3])
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    tensors[f"{first}.B"] = basis.b(first) @ mix
    space = torch.linalg.svd(basis.a(second)).Vh
    tensors[f"{second}.A"] = space[4:8].contiguous()
    kept = tuple(t for t in basis.targets if t.module != third)
    del tensors[f"{third}.A"], tensors[f"{third}.B"]
    save_basis(basis, tmp_path / "a")
    save_basis(replace(basis, tensors=tensors, targets=kept), tmp_path / "b")
    told = compare(diff, tmp_path / "a", tmp_path / "b")
    rows = {row["module"]: row for row in told["modules"]}
    assert rows[first]["largest_angle_B"] < 1e-4 and rows[first]["overlap"] == pytest.approx(1)
    assert rows[second]["mean_angle_A"] == pytest.approx(90, abs=1e-4)
    assert rows[second]["overlap"] == pytest.approx(0, abs=1e-9)
    assert told["modules"][0]["module"] == second  # the greatest difference first
    assert (told["same"], told["only_in_a"], told["only_in_b"]) == (False, [third], [])
    assert compare(diff, tmp_path / "a", tmp_path / "a")["same"] is True
    save_basis(random_basis(pico, 6, seed=4), tmp_path / "wider")
    row = compare(diff, tmp_path / "a", tmp_path / "wider")["modules"][0]
    assert (row["rank_a"], row["rank_b"]) == (4, 6)


def test_models_differ_tensor_by_tensor_however_they_are_sharded(
    diff: Run, pico: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((pico / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    tensors = load_file(pico / "model.safetensors")
    moved = tensors["model.layers.1.mlp.up_proj.weight"]
    noise = 0.01 * torch.randn(moved.shape, generator=torch.Generator().manual_seed(2))
    noise[:32] = 0
    tensors["model.layers.1.mlp.up_proj.weight"] = moved + noise
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    tensors["new"] = torch.zeros(3)
    del tensors["model.layers.0.input_layernorm.weight"]
    names = sorted(tensors)
    index = {}
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, other / shard, {"format": "pt"})
        index |= {name: shard for name in part}
    text = json.dumps({"weight_map": index})
    (other / "model.safetensors.index.json").write_text(text)
    told = compare(diff, pico, other)
    rows = {row["tensor"]: row for row in told["tensors"]}
    assert set(rows) == {"model.layers.1.mlp.up_proj.weight", "model.norm.weight"}
    row = rows["model.layers.1.mlp.up_proj.weight"]
    real = (moved + noise).double() - moved.double()
    assert row["rms_difference"] == pytest.approx(real.square().mean().sqrt().item(), rel=1e-6)
    assert row["ratio"] == pytest.approx((real.norm() / moved.double().norm()).item(), rel=1e-6)
    assert row["largest"] == pytest.approx(real.abs().max().item())
    assert row["changed"] == pytest.approx((real != 0).double().mean().item())
    assert told["of_other_dtype"] == ["model.norm.weight"] and told["config"] == ["rope_theta"]
    assert told["only_in_a"] == ["model.layers.0.input_layernorm.weight"]
    assert told["only_in_b"] == ["new"] and told["of_other_shape"] == []
    assert told["same_tensors"] + told["changed_tensors"] == len(tensors) - 1
    same = compare(diff, pico, pico)
    assert (same["changed_tensors"], same["tensors"], same["config"]) == (0, [], [])


def test_the_text_shows_facts_and_the_greatest_differences(
    diff: Run, basis: Basis, tmp_path: Path
) -> None:
    save_basis(basis, tmp_path / "basis")
    for seed in (1, 2):
        save_adapter(random_adapter(basis, seed), tmp_path / str(seed))
    _, said, _ = diff(tmp_path / "1", tmp_path / "2", "--basis", tmp_path / "basis")
    lines = said.splitlines()
    assert "of: merged weights" in lines and any(line.startswith("cosine: ") for line in lines)
    assert lines[-15].split()[:2] == ["module", "distance"] and len(lines[-14:]) == 14


def test_what_cannot_be_compared_is_refused(
    diff: Run, basis: Basis, pico: Path, tmp_path: Path
) -> None:
    save_basis(basis, tmp_path / "basis")
    save_adapter(random_adapter(basis, 1), tmp_path / "one")
    other = replace(basis, scaling=9.0)
    save_basis(other, tmp_path / "other-basis")
    save_adapter(random_adapter(other, 1), tmp_path / "other")
    store = tmp_path / "adapters"
    save_adapter(random_adapter(basis, 1), store / "one.safetensors")
    for words, text in (
        (("one", "basis"), "expected two of a kind"),
        (("one", "other"), f"expected one of {basis.size} for {basis.digest}"),
        (("one", "one", "--basis", tmp_path / "other-basis"), "found an adapter for basis"),
        (("basis", "basis", "--basis", tmp_path / "basis"), "expected two adapters"),
        (("adapters", "adapters"), "expected an adapter, a basis or a model folder"),
        (("one", "none"), "no such file or folder"),
    ):
        paths = [tmp_path / word for word in words[:2]]
        status, said, errors = diff(*paths, *words[2:])
        assert (status, said) == (2, "") and text in errors.splitlines()[-1], errors
