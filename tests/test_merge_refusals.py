"""`lorasb merge` from the command line: what it says, what it refuses, what it leaves behind."""

import dataclasses
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from bases import random_adapter, random_basis
from conftest import Run
from pico import make_pico_llama

from lorasb_runtime.merging import checkpoint
from lorasb_runtime.storage.adapter_file import save_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis
from lorasb_runtime.storage.checkpoint import INDEX, SINGLE

Q0 = "model.layers.0.self_attn.q_proj"
Change = Callable[[Path], None]


@pytest.fixture
def lorasb(command: Run) -> Run:
    """Runs `lorasb merge ...`."""
    return partial(command, "merge")


@pytest.fixture
def work(pico: Path, tmp_path: Path) -> Path:
    """A folder with `model`, a `basis` and the adapters `a` and `b` for it."""
    shutil.copytree(pico, tmp_path / "model")
    basis = random_basis(pico, rank=4)
    save_files(basis, tmp_path)
    return tmp_path


def save_files(basis: Basis, folder: Path, strength: float = 1.0) -> None:
    save_basis(basis, folder / "basis")
    for seed, name in enumerate("ab"):
        save_adapter(random_adapter(basis, seed, strength, name), folder / name)


def arguments(work: Path, *more: str | Path) -> tuple[str | Path, ...]:
    return (work / "model", "--basis", work / "basis", "-o", work / "out", *more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / SINGLE)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = weights(folder)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / SINGLE, {"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_it_merges_and_reports(lorasb: Run, work: Path) -> None:
    status, out, _ = lorasb(*arguments(work, work / "a", f"{work / 'b'}=-0.5", "--json"))
    result = json.loads(out)
    assert status == 0
    assert result["kept"] == pytest.approx(1.0, abs=1e-6)
    assert result["delta_ratio"] > 0.01
    assert result["modules"][Q0].keys() == {"delta_ratio", "kept", "relative_error", "measured"}
    header = safetensors.safe_open(work / "out" / SINGLE, "pt").metadata()
    adapters = json.loads(header["lorasb.adapters"])
    assert {(a["name"], a["weight"]) for a in adapters} == {("a", 1.0), ("b", -0.5)}
    assert [a["version"] for a in adapters] == sorted(a["version"] for a in adapters)
    assert json.loads(header["lorasb.base_model"])["fingerprint"].startswith("sha256:")
    assert header["lorasb.basis"].startswith("sha256:")
    assert header["lorasb.method"] == "linear"
    assert header["lorasb.version"]


def test_it_says_when_rounding_eats_the_delta(lorasb: Run, work: Path) -> None:
    rewrite(work / "model", lambda t: t.update({name: w.bfloat16() for name, w in t.items()}))
    set_config(work / "model", dtype="bfloat16")
    save_files(random_basis(work / "model", rank=4), work, strength=1e-3)
    status, out, err = lorasb(*arguments(work, work / "a"))
    assert status == 0
    assert "rms(delta)/rms(W)    kept  relative error" in out
    said = " ".join(err.split())
    assert "warning: rounding left" in said
    assert "--rounding stochastic, or serve the adapter unmerged" in said
    status, _, err = lorasb(*arguments(work, work / "a", "--dtype", "float32", "--force"))
    assert (status, "warning" in err) == (0, False)


def test_subtracting_turns_every_sign_round(lorasb: Run, work: Path) -> None:
    words = (work / "a", f"{work / 'b'}=-0.5")
    assert lorasb(*arguments(work, *words))[0] == 0
    plus, base = weights(work / "out"), weights(work / "model")
    assert lorasb(*arguments(work, *words, "--subtract", "--force"))[0] == 0
    minus = weights(work / "out")
    header = safetensors.safe_open(work / "out" / SINGLE, "pt").metadata()
    adapters = json.loads(header["lorasb.adapters"])
    assert {(a["name"], a["weight"]) for a in adapters} == {("a", -1.0), ("b", 0.5)}
    for name, tensor in base.items():
        assert torch.allclose(plus[name] + minus[name], 2 * tensor, atol=1e-6)
    assert not torch.allclose(minus[f"{Q0}.weight"], base[f"{Q0}.weight"], atol=1e-3)


def test_a_gguf_file_is_refused_with_the_way_out(lorasb: Run, work: Path) -> None:
    (work / "x.gguf").write_bytes(b"GGUF")
    words = (work / "a", "--basis", work / "basis", "-o", work / "out")
    status, _, err = lorasb(work / "x.gguf", *words)
    assert status == 2
    assert "found a GGUF file, expected a folder of safetensors; unpack it first" in err


def test_an_equals_sign_may_be_part_of_a_file_name(lorasb: Run, work: Path) -> None:
    shutil.copy(work / "a", work / "x=2")
    for text in ("x=2", "x=2=1"):
        status, _, err = lorasb(*arguments(work, work / text, "--force"))
        assert status == 0, err
        header = safetensors.safe_open(work / "out" / SINGLE, "pt").metadata()
        assert json.loads(header["lorasb.adapters"])[0]["weight"] == 1.0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["a=abc"], "found weight 'abc', expected"),
        (["a=nan"], "found weight 'nan', expected"),
        (["a=-inf"], "found weight '-inf', expected"),
        (["a="], "found weight '', expected"),
        (["a=1e308", "a=1e308"], "found weight '1e308', expected"),
        (["a=3e38"] * 99, "the cores do not fit float32"),
        (["nothing"], "nothing: no such file"),
        (["a", "--method", "median"], "method: found 'median', expected one of linear"),
        (["a", "--dtype", "int8"], "dtype: found 'int8', expected one of bfloat16"),
        (["a", "--dtype", ""], "dtype: found '', expected one of"),
        (["a", "--rounding", "odd"], "rounding: found 'odd', expected nearest or stochastic"),
        (["a", "--seed", "1"], "--seed needs --rounding stochastic"),
        (["a", "--rounding", "stochastic"], "rounding: found stochastic for weights written in 32"),
        (["a", "--untie"], "--untie: found no target on a tied output embedding"),
        (["a", "--dequantize"], "found plain weights, expected quantized ones to unpack"),
        (["a", "--workers", "0"], "Invalid value for '--workers'"),
        (["a", "-o", "model"], "model: found the model's own folder"),
        (["a", "-o", "model", "--force"], "model: found the model's own folder"),
        (["a", "-o", "model/inside"], "inside: found the model's own folder"),
        (["a", "-o", ".", "--force"], "found the model's own folder"),
        (["a", "-o", "used"], "used: already exists; choose another output or pass --force"),
        (["a", "-o", "used", "--force"], "found something other than a model folder"),
        (["a", "-o", "basis", "--force"], "found something other than a model folder"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    lorasb: Run, work: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    monkeypatch.chdir(work)
    (work / "used").mkdir()
    (work / "used" / "diary").write_text("dear diary")
    before = sorted(work.rglob("*"))
    status, out, err = lorasb(*arguments(work, *more))
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert sorted(work.rglob("*")) == before


def other_weights(work: Path) -> None:
    rewrite(work / "model", lambda t: t[f"{Q0}.weight"].add_(1))


def other_basis(work: Path) -> None:
    save_basis(random_basis(work / "model", rank=4, seed=9), work / "basis")


def quantized(work: Path) -> None:
    set_config(work / "model", quantization_config={"quant_method": "fp8"})
    unverified(work)


def unverified(work: Path, **target: Any) -> None:
    """A basis that names no model, as an import gives, with its first target changed."""
    basis = random_basis(work / "model", rank=4)
    tensors, first = dict(basis.tensors), basis.targets[0]
    changed = dataclasses.replace(first, **target)
    tensors[f"{changed.module}.A"] = torch.ones(changed.rank, changed.in_features)
    tensors[f"{changed.module}.B"] = torch.ones(changed.out_features, changed.rank)
    if changed.module != first.module:
        del tensors[f"{first.module}.A"], tensors[f"{first.module}.B"]
    save_files(
        dataclasses.replace(
            basis, targets=(changed, *basis.targets[1:]), tensors=tensors, base_model=None
        ),
        work,
    )


def wrong_shape(work: Path) -> None:
    unverified(work, in_features=31)


def integers(work: Path) -> None:
    unverified(work)
    rewrite(work / "model", lambda t: t.update({f"{Q0}.weight": t[f"{Q0}.weight"].to(torch.int8)}))


def missing(work: Path) -> None:
    unverified(work)
    rewrite(work / "model", lambda t: t.pop(f"{Q0}.weight"))


def head(work: Path) -> None:
    shutil.rmtree(work / "model")
    make_pico_llama(work / "model")
    basis = random_basis(work / "model", rank=4, pattern="lm_head")
    save_files(dataclasses.replace(basis, base_model=None), work)


def tied_head(work: Path) -> None:
    head(work)
    shutil.rmtree(work / "model")
    make_pico_llama(work / "model", tie_word_embeddings=True)


def tied_head_with_a_tensor(work: Path) -> None:
    head(work)
    set_config(work / "model", tie_word_embeddings=True)


def same_tensor_twice(work: Path) -> None:
    unverified(work, module="layers.0.self_attn.k_proj", in_features=32, out_features=16)
    rewrite(
        work / "model",
        lambda t: t.update({k.removeprefix("model."): t.pop(k) for k in list(t) if "layers" in k}),
    )


def duplicates(work: Path) -> None:
    tensors = weights(work / "model")
    (work / "model" / SINGLE).unlink()
    for name in ("one", "two"):
        safetensors.torch.save_file(tensors, work / "model" / f"{name}.safetensors")
    files = {t: ("one" if i % 2 else "two") + ".safetensors" for i, t in enumerate(tensors)}
    (work / "model" / INDEX).write_text(json.dumps({"weight_map": files}))


def wrong_index(work: Path) -> None:
    files = dict.fromkeys((*weights(work / "model"), "model.more"), SINGLE)
    (work / "model" / INDEX).write_text(json.dumps({"weight_map": files}))


def damaged(work: Path) -> None:
    path = work / "model" / SINGLE
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shape":[32]', b'"shape":[33]'))
    basis = random_basis_of(data, work)
    save_files(dataclasses.replace(basis, base_model=None), work)


def random_basis_of(data: bytes, work: Path) -> Basis:
    """A basis for the model as it was with `data` for its weights."""
    shutil.copytree(work / "model", work / "whole")
    (work / "whole" / SINGLE).write_bytes(data)
    return random_basis(work / "whole", rank=4)


def too_large_for_float16(work: Path) -> None:
    rewrite(work / "model", lambda t: t[f"{Q0}.weight"].mul_(1e6))
    save_files(random_basis(work / "model", rank=4), work)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, "found a basis for the model sha256:"),
        (other_basis, "found an adapter for basis sha256:"),
        (quantized, "found a quantized checkpoint, expected plain weights"),
        (wrong_shape, f"found {Q0} of shape [32, 31], expected the model's [32, 32]"),
        (integers, f"{Q0}.weight: found dtype I8, expected one of F64, F32, F16, BF16"),
        (missing, f"found no tensor for module {Q0}, expected {Q0}.weight"),
        (tied_head, "lm_head: found an output embedding tied to the input's"),
        (tied_head_with_a_tensor, "lm_head: found an output embedding tied to the input's"),
        (same_tensor_twice, "expected one target for each weight"),
        (duplicates, "found a duplicate of"),
        (wrong_index, "found model.more in model.safetensors, expected it in none"),
        (damaged, "model.safetensors: found damage"),
        (too_large_for_float16, f"{Q0}: found Inf or NaN in the merged weight"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(
    lorasb: Run, work: Path, change: Change, message: str
) -> None:
    change(work)
    before = sorted(work.rglob("*"))
    status, out, err = lorasb(*arguments(work, work / "a", "--dtype", "float16"))
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert sorted(work.rglob("*")) == before


def test_a_full_disk_is_seen_before_the_first_byte(
    lorasb: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    before = sorted(work.rglob("*"))
    status, _, err = lorasb(*arguments(work, work / "a"))
    assert status == 2
    assert "found 1,000 bytes of free disk, expected" in err
    assert sorted(work.rglob("*")) == before


def test_a_crash_in_the_middle_leaves_nothing(
    lorasb: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def crash(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise RuntimeError("the power went")
        return fold_target(*args, **options)

    fold_target = checkpoint.fold_target
    monkeypatch.setattr(checkpoint, "fold_target", crash)
    before = sorted(work.rglob("*"))
    with pytest.raises(RuntimeError, match="the power went"):
        lorasb(*arguments(work, work / "a"))
    assert sorted(work.rglob("*")) == before


def test_force_replaces_an_earlier_merge_and_a_failure_spares_it(
    lorasb: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lorasb(*arguments(work, work / "a"))[0] == 0
    first = weights(work / "out")[f"{Q0}.weight"]
    (work / "out" / "stale").write_text("from the first merge")
    status, _, err = lorasb(*arguments(work, work / "b"))
    assert (status, "already exists" in err) == (2, True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "fold_target", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lorasb(*arguments(work, work / "b", "--force"))
    assert torch.equal(weights(work / "out")[f"{Q0}.weight"], first)
    assert lorasb(*arguments(work, work / "b", "--force"))[0] == 0
    assert not torch.equal(weights(work / "out")[f"{Q0}.weight"], first)
    assert not (work / "out" / "stale").exists()
