"""`lorasb merge --verify`: what it reports, and that it sees a model that was merged wrongly."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from bases import basis_for, random_adapter, random_basis, reference_logits
from conftest import Run
from merging import deltas_of, merge, tensors_of

from lorasb_runtime.errors import InputError, VerificationError
from lorasb_runtime.merging import checkpoint
from lorasb_runtime.merging.checkpoint import MergeConfig
from lorasb_runtime.merging.delta import DenseDelta
from lorasb_runtime.merging.fold import Rounding
from lorasb_runtime.merging.verify import NEW_TOKENS, Verification, Verifier
from lorasb_runtime.models.load import load_tokenizer
from lorasb_runtime.storage.adapter_file import Adapter, save_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis
from lorasb_runtime.storage.checkpoint import SINGLE, open_checkpoint

PROMPTS = ["Hello", "xyz"]


def verify(
    model: Path, basis: Basis, adapter: Adapter, merged: Path, config: MergeConfig
) -> Verification:
    verifier = Verifier(open_checkpoint(model), basis, deltas_of(basis, adapter), config, PROMPTS)
    verifier(merged)
    assert verifier.result is not None
    return verifier.result


@pytest.mark.parametrize(
    "config",
    [
        MergeConfig(),
        MergeConfig(dtype=torch.bfloat16),
        MergeConfig(dtype=torch.bfloat16, rounding=Rounding(True, 7)),
    ],
    ids=["float32", "bfloat16", "stochastic"],
)
def test_a_right_merge_differs_by_no_more_than_rounding(
    config: MergeConfig, pico: Path, tmp_path: Path
) -> None:
    basis = random_basis(pico, rank=4, scaling=0.5)
    adapter = random_adapter(basis, 0)
    merge(pico, basis, tmp_path / "out", adapter, dtype=config.dtype, rounding=config.rounding)
    found = verify(pico, basis, adapter, tmp_path / "out", config)
    tokens = load_tokenizer(pico)(PROMPTS[0])["input_ids"]
    pairs = [reference_logits(pico, basis, a, tokens) for a in (adapter, None)]
    assert found.effect >= (pairs[0] - pairs[1]).abs().max().item() * 0.999
    assert found.peak >= pairs[0].abs().max().item() * 0.999
    assert found.tokens == 2 * NEW_TOKENS
    if config.dtype is None:
        assert found.difference < 1e-4
        assert found.agreeing == found.tokens
    else:
        assert 1e-3 < found.difference <= found.allowed < found.effect


def test_a_float64_model_is_verified_too(pico: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(pico, model)
    tensors = {name: tensor.double() for name, tensor in tensors_of(pico).items()}
    safetensors.torch.save_file(tensors, model / SINGLE, {"format": "pt"})
    basis = random_basis(model, rank=4)
    adapter = random_adapter(basis, 0)
    merge(model, basis, tmp_path / "out", adapter)
    found = verify(model, basis, adapter, tmp_path / "out", MergeConfig())
    assert found.difference < 1e-4 < found.effect


def wrong_sign(basis: Basis, adapter: Adapter) -> Adapter:
    return dataclasses.replace(adapter, cores=-adapter.cores)


def nothing_added(basis: Basis, adapter: Adapter) -> Adapter:
    return dataclasses.replace(adapter, cores=0 * adapter.cores)


def one_module_left_out(basis: Basis, adapter: Adapter) -> Adapter:
    cores = adapter.cores.clone()
    basis.core(cores, 3).zero_()
    return dataclasses.replace(adapter, cores=cores)


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        (wrong_sign, None),
        (nothing_added, torch.bfloat16),
        (one_module_left_out, None),
        (one_module_left_out, torch.bfloat16),
    ],
)
def test_a_wrong_merge_is_seen(
    wrong: Callable[[Basis, Adapter], Adapter],
    dtype: torch.dtype | None,
    pico: Path,
    tmp_path: Path,
) -> None:
    basis = random_basis(pico, rank=4)
    adapter = random_adapter(basis, 0)
    merge(pico, basis, tmp_path / "out", wrong(basis, adapter), dtype=dtype)
    with pytest.raises(VerificationError, match="verify: found logits"):
        verify(pico, basis, adapter, tmp_path / "out", MergeConfig(dtype=dtype))


@pytest.fixture
def work(pico: Path, tmp_path: Path) -> Path:
    shutil.copytree(pico, tmp_path / "model")
    basis = random_basis(pico, rank=4)
    save_basis(basis, tmp_path / "basis")
    save_adapter(random_adapter(basis, 0), tmp_path / "a")
    return tmp_path


def words(work: Path, *more: object) -> tuple[object, ...]:
    return (
        "merge",
        work / "model",
        work / "a",
        "--basis",
        work / "basis",
        "-o",
        work / "out",
        *more,
    )


def test_the_command_verifies_and_tells(command: Run, work: Path) -> None:
    (work / "prompts").write_text("one\n\ntwo\n")
    status, out, err = command(
        *words(work, "--verify", "--prompt", "three", "--prompts", work / "prompts", "--json")
    )
    assert status == 0, err
    said = json.loads(out)["verified"]
    assert said["tokens"] == said["agreeing_tokens"] == 3 * NEW_TOKENS
    assert said["difference"] <= said["allowed"] < said["effect"]
    status, out, err = command(*words(work, "--verify", "--force"))
    assert (status, "warning" in err) == (0, False)
    assert f"{4 * NEW_TOKENS} of {4 * NEW_TOKENS} greedy tokens equal" in out


def test_a_merge_that_fails_its_verification_leaves_nothing(
    command: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(weight: object, delta: DenseDelta, *rest: object, **more: object) -> object:
        class Half:
            def block(self, rows: slice, columns: slice) -> torch.Tensor:
                return delta.block(rows, columns) / 2

        return fold_target(weight, Half(), *rest, **more)

    fold_target = checkpoint.fold_target
    monkeypatch.setattr(checkpoint, "fold_target", half)
    before = sorted(work.rglob("*"))
    status, out, err = command(*words(work, "--verify"))
    assert (status, out) == (1, "")
    assert "verify: found logits" in err.splitlines()[-1]
    assert "nothing was written" in err.splitlines()[-1]
    assert sorted(work.rglob("*")) == before


def test_it_says_when_the_prompts_do_not_show_the_adapter(command: Run, work: Path) -> None:
    basis = random_basis(work / "model", rank=4)
    save_adapter(random_adapter(basis, 0, 1e-5), work / "a")
    status, _, err = command(*words(work, "--verify", "--dtype", "bfloat16"))
    assert status == 0
    assert "warning: --verify cannot tell" in " ".join(err.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", "x"], "--prompt and --prompts need --verify"),
        (["--prompts", "a"], "--prompt and --prompts need --verify"),
        (["--verify", "--prompts", "nothing"], "nothing: no such file"),
        (["--verify", "--prompts", "empty"], "empty: found no prompts"),
        (["--verify", "--prompt", ""], "prompt '': found no tokens"),
    ],
)
def test_wrong_prompts_are_refused_before_anything_is_written(
    command: Run, work: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    monkeypatch.chdir(work)
    (work / "empty").write_text("\n \n")
    before = sorted(work.rglob("*"))
    status, out, err = command(*words(work, *more))
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert sorted(work.rglob("*")) == before


def test_a_model_without_a_tokenizer_cannot_be_verified(pico: Path, tmp_path: Path) -> None:
    shutil.copytree(pico, tmp_path / "model")
    for path in (tmp_path / "model").glob("*token*"):
        path.unlink()
    basis = basis_for(random_basis(pico, rank=4).targets)
    with pytest.raises(InputError, match="no usable tokenizer"):
        Verifier(
            open_checkpoint(tmp_path / "model"),
            basis,
            deltas_of(basis, random_adapter(basis, 0)),
            MergeConfig(),
            PROMPTS,
        )
