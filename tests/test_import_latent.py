"""LoRA-SB and LoRA-XS training checkpoints: every spelling, and their cores bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bases import reference_logits
from foreign import (
    PREFIX,
    TOKENS,
    dense,
    peft_logits,
    rewrite,
    save_latent,
    set_config,
    tensors_of,
)

from lorasb_runtime.errors import FileFormatError, InputError
from lorasb_runtime.importing.run import ImportConfig, ImportResult, import_checkpoints
from lorasb_runtime.storage.adapter_file import Adapter, load_adapter
from lorasb_runtime.storage.basis_file import Basis, load_basis

Q = "model.layers.0.self_attn.q_proj"
LATENT = f"{PREFIX}{Q}.default_lora_latent_mapping.weight"


def run(output: Path, *folders: Path, **config: object) -> ImportResult:
    return import_checkpoints(list(folders), ImportConfig(**config), output)


def load(output: Path, *names: str) -> tuple[Basis, list[Adapter]]:
    basis = load_basis(output / "basis.safetensors")
    return basis, [load_adapter(output / f"{name}.safetensors", basis) for name in names]


def core_of(folder: Path, module: str) -> torch.Tensor:
    """The checkpoint's own core of a module."""
    (found,) = (
        tensor
        for name, tensor in tensors_of(folder).items()
        if name.startswith(f"{PREFIX}{module}") and "latent" in name
    )
    return found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("old_keys", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cores_are_kept_bit_for_bit(
    old_keys: bool, dtype: torch.dtype, pico: Path, tmp_path: Path
) -> None:
    folder = save_latent(pico, tmp_path / "alice", old_keys=old_keys, dtype=dtype)
    result = run(tmp_path / "out", folder)
    basis, (adapter,) = load(tmp_path / "out", "alice")
    assert len(basis.targets) == 6 and basis.scaling == 1.0
    for index, target in enumerate(basis.targets):
        assert same_bits(basis.core(adapter.cores, index), core_of(folder, target.module))
        a = tensors_of(folder)[f"{PREFIX}{target.module}.lora_A.weight"]
        assert same_bits(basis.a(target.module).to(dtype), a)
    assert result.adapters[0].fits is None
    assert basis.info["guess"]["method"] == "lora-sb"


def test_the_logits_are_those_of_b_r_a_and_pefts_are_not(pico: Path, tmp_path: Path) -> None:
    folder = save_latent(pico, tmp_path / "alice", "lora-xs", lora_alpha=8, seed=3)
    run(tmp_path / "out", folder, model=str(pico))
    basis, (adapter,) = load(tmp_path / "out", "alice")
    assert basis.scaling == 2.0
    for index, target in enumerate(basis.targets):
        core = basis.core(adapter.cores, index).double()
        found = basis.scaling * (
            basis.b(target.module).double() @ core @ basis.a(target.module).double()
        )
        assert torch.allclose(found, dense(folder, target.module, 2.0), rtol=1e-12)
    found, base = (reference_logits(pico, basis, a, TOKENS) for a in (adapter, None))
    assert (found - base).abs().max() > 0.1 * base.abs().max()
    assert (found - peft_logits(pico, folder)).abs().max() > 0.1 * base.abs().max()


@pytest.mark.parametrize(
    ("method", "alpha", "rslora", "scaling", "guess"),
    [
        ("lora-sb", 4, False, 1.0, "lora-sb"),
        ("lora-sb", 6, True, 3.0, "lora-sb"),
        ("lora-xs", 64, False, 16.0, "lora-xs"),
    ],
)
def test_scaling_goes_into_the_basis_and_the_method_is_a_guess(
    method: str, alpha: int, rslora: bool, scaling: float, guess: str, pico: Path, tmp_path: Path
) -> None:
    folder = save_latent(pico, tmp_path / "a", method, lora_alpha=alpha, use_rslora=rslora)
    run(tmp_path / "out", folder)
    basis, (adapter,) = load(tmp_path / "out", "a")
    assert (basis.scaling, basis.method) == (scaling, "imported")
    assert basis.info["guess"]["method"] == guess
    assert adapter.info["imported"]["guess"] == basis.info["guess"]


def test_a_basis_of_neither_kind_is_guessed_to_be_neither(pico: Path, tmp_path: Path) -> None:
    folder = save_latent(pico, tmp_path / "a")
    tensors = tensors_of(folder)
    tensors[f"{PREFIX}{Q}.lora_B.weight"] *= 1.5
    rewrite(folder, tensors)
    assert run(tmp_path / "out", folder).basis.info["guess"]["method"] is None


@pytest.mark.parametrize("place", [".", "..", None])
def test_the_reconstruction_lies_beside_or_above_or_nowhere(
    place: str | None, pico: Path, tmp_path: Path
) -> None:
    folder = save_latent(pico, tmp_path / "alice" / "final_model")
    stated = {"reconstruction_type": "svd", "r_squared": True, "svd": {"rank": 4, "n_iter": 10}}
    if place is not None:
        (folder / place / "reconstr_config.json").write_text(json.dumps(stated))
    result = run(tmp_path / "out", folder)
    assert result.adapters[0].file.name == "alice.safetensors"
    kept = {"reconstruction_type": "svd", "r_squared": True}
    assert result.basis.info.get("reconstruction") == (None if place is None else kept)


def test_checkpoints_that_share_a_basis_get_one(pico: Path, tmp_path: Path) -> None:
    one = save_latent(pico, tmp_path / "one", seed=1, dtype=torch.bfloat16)
    two = save_latent(pico, tmp_path / "two", seed=2, dtype=torch.bfloat16, old_keys=True)
    run(tmp_path / "out", one, two, model=str(pico))
    basis, adapters = load(tmp_path / "out", "one", "two")
    for folder, adapter in zip((one, two), adapters, strict=True):
        for index, target in enumerate(basis.targets):
            assert same_bits(basis.core(adapter.cores, index), core_of(folder, target.module))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "basis.safetensors",
        "one.safetensors",
        "two.safetensors",
    ]


def test_a_module_that_one_of_them_lacks_is_zeros_there(pico: Path, tmp_path: Path) -> None:
    whole = save_latent(pico, tmp_path / "whole")
    part = save_latent(pico, tmp_path / "part", seed=5)
    rewrite(part, {n: t for n, t in tensors_of(part).items() if Q not in n})
    run(tmp_path / "out", part, whole)
    basis, (missing, _) = load(tmp_path / "out", "part", "whole")
    ends = ["mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"]
    modules = [f"model.layers.{layer}.{end}" for layer in range(2) for end in ends]
    assert [t.module for t in basis.targets] == modules
    index = [t.module for t in basis.targets].index(Q)
    assert not basis.core(missing.cores, index).any()
    assert missing.cores.count_nonzero() == basis.size - 16


def test_another_basis_is_refused_with_the_ways_out(pico: Path, tmp_path: Path) -> None:
    one = save_latent(pico, tmp_path / "one")
    two = save_latent(pico, tmp_path / "two", basis_seed=1)
    with pytest.raises(InputError, match=r"two: found another basis than .*one has, at .*compress"):
        run(tmp_path / "out", one, two)
    assert not (tmp_path / "out").exists()


def test_a_scaling_that_changes_no_bit_goes_into_the_cores(pico: Path, tmp_path: Path) -> None:
    """Twice and four times the other's: exact in bf16. One and a half times: exact in float32."""
    one = save_latent(pico, tmp_path / "one", dtype=torch.bfloat16)
    for alpha, factor, dtype in ((8, 2, "bfloat16"), (1, 0.25, "bfloat16"), (6, 1.5, "float32")):
        name = f"two{alpha}"
        two = save_latent(pico, tmp_path / name, dtype=torch.bfloat16, seed=2, lora_alpha=alpha)
        run(tmp_path / f"out{alpha}", one, two)
        basis, (_, adapter) = load(tmp_path / f"out{alpha}", "one", name)
        assert basis.scaling == 1.0
        assert adapter.cores.dtype == getattr(torch, dtype)
        for index, target in enumerate(basis.targets):
            expected = core_of(two, target.module).double() * factor
            assert torch.equal(basis.core(adapter.cores, index).double(), expected)


def test_a_scaling_that_would_round_the_cores_is_refused(pico: Path, tmp_path: Path) -> None:
    one = save_latent(pico, tmp_path / "one", lora_alpha=4)
    two = save_latent(pico, tmp_path / "two", lora_alpha=3)  # 0.75: a float32 core may not hold it
    with pytest.raises(InputError, match=r"a scaling of 0\.75 beside 1\.0 on the same basis"):
        run(tmp_path / "out", one, two)
    mixed = save_latent(pico, tmp_path / "mixed", alpha_pattern={"q_proj": 5})
    with pytest.raises(InputError, match=r"mixed.*: found a scaling of 1\.25 beside 1\.0"):
        run(tmp_path / "out", mixed)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (LATENT, None, r"q_proj with .*alone, expected its core as well"),
        (f"{PREFIX}{Q}.lora_B.weight", None, "alone, expected its lora_B as well"),
        (LATENT, torch.ones(3, 3), r"a core of shape \[3, 3\], expected the rank 4"),
        (LATENT, torch.ones(4, 5), r"a core of shape \[4, 5\]"),
        (LATENT, torch.ones(16), r"of shape \[16\], expected 2 dimensions"),
        (LATENT, torch.full((4, 4), float("nan")), "found NaN or Inf in"),
        (f"{PREFIX}{Q}.lora_A.weight", torch.full((4, 32), float("inf")), "found NaN or Inf in"),
        (f"{PREFIX}{Q}.lora_A.weight", torch.ones(5, 32), "one rank in both"),
        (LATENT, torch.ones(4, 4, dtype=torch.int64), "of dtype I64, expected F32, F16 or BF16"),
        (LATENT, torch.ones(4, 4, dtype=torch.float64), "of dtype F64"),
        (f"{PREFIX}{Q}_lora_latent_mapping.weight", torch.ones(4, 4), "each module once"),
    ],
)
def test_damaged_tensors_are_refused(
    name: str, tensor: torch.Tensor | None, message: str, pico: Path, tmp_path: Path
) -> None:
    folder = save_latent(pico, tmp_path / "a")
    tensors = {n: t for n, t in tensors_of(folder).items() if n != name}
    if tensor is not None:
        tensors[name] = tensor
    rewrite(folder, tensors)
    with pytest.raises(FileFormatError, match=message):
        run(tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


def test_a_head_that_was_trained_along_is_refused(pico: Path, tmp_path: Path) -> None:
    folder = save_latent(pico, tmp_path / "a")
    rewrite(folder, {**tensors_of(folder), f"{PREFIX}classifier.out_proj.bias": torch.ones(2)})
    with pytest.raises(InputError, match=r"classifier\.out_proj\.bias', a trained bias; train"):
        run(tmp_path / "out", folder)
    set_config(folder, modules_to_save=["classifier", "score"])
    with pytest.raises(InputError, match="found modules_to_save, expected none; train without"):
        run(tmp_path / "out", folder)


def test_names_come_from_folders_and_must_differ(pico: Path, tmp_path: Path) -> None:
    first = save_latent(pico, tmp_path / "a b" / "checkpoint-5")
    second = tmp_path / "c" / "checkpoint-5"
    shutil.copytree(first, second)
    result = run(tmp_path / "out", first, second)
    assert [a.file.name for a in result.adapters] == [
        "a-b-checkpoint-5.safetensors",
        "c-checkpoint-5.safetensors",
    ]
    with pytest.raises(InputError, match="which is another's too"):
        run(tmp_path / "again", first, first)
    shutil.copytree(first, tmp_path / "basis")
    with pytest.raises(InputError, match=r"basis: found the name 'basis' for its adapter"):
        run(tmp_path / "again", tmp_path / "basis")
