"""Merge methods from the command line: `lorasb merge` and `lorasb blend` share them."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from bases import random_adapter, random_basis
from conftest import Run

from lorasb_runtime.merging import METHODS, Part, Space, find_method
from lorasb_runtime.storage.adapter_file import Adapter, load_adapter, save_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis
from lorasb_runtime.storage.checkpoint import SINGLE

ON_CORES = [name for name, method in METHODS.items() if method.space is not Space.DELTA]


@pytest.fixture
def basis(pico: Path) -> Basis:
    return random_basis(pico, rank=4, scaling=0.5, pattern="self_attn")


@pytest.fixture
def work(basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the basis file `basis` and the adapters `a` and `b`."""
    monkeypatch.chdir(tmp_path)
    save_basis(basis, "basis")
    for seed, name in enumerate("ab"):
        save_adapter(random_adapter(basis, seed, name=name), name)
    return tmp_path


def needed(name: str) -> list[str]:
    return ["--density", "0.3"] if name.startswith(("dare", "core-dare")) else []


def delta(basis: Basis, index: int, adapter: Adapter) -> torch.Tensor:
    module = basis.targets[index].module
    core = basis.core(adapter.cores, index).double()
    return basis.scaling * (basis.b(module).double() @ core @ basis.a(module).double())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_merges_into_weights(
    command: Run, pico: Path, basis: Basis, work: Path, name: str
) -> None:
    words = ["b=0.5", "a", "--method", name, *needed(name)]
    status, _, errors = command("merge", pico, *words, "--basis", "basis", "-o", "out")
    assert status == 0, errors
    header = safetensors.safe_open(work / "out" / SINGLE, "pt").metadata()
    assert header["lorasb.method"] == name
    options = json.loads(header["lorasb.options"])
    method = find_method(name).with_options(options)
    assert method.options == options
    adapters = json.loads(header["lorasb.adapters"])
    if METHODS[name].ordered:
        assert [entry["name"] for entry in adapters] == ["b", "a"]
    before, after = (safetensors.torch.load_file(f / SINGLE) for f in (pico, work / "out"))
    if method.space is Space.CORE:  # what it makes of cores is compared in the blend below
        return
    for index, target in enumerate(basis.targets):
        parts = [
            Part(
                delta(basis, index, load_adapter(entry["name"])),
                entry["weight"],
                target.module,
                entry["version"],
            )
            for entry in adapters
        ]
        weight = f"{target.module}.weight"
        expected = before[weight].double() + method(parts)
        assert torch.allclose(after[weight].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ON_CORES)
def test_a_blend_merges_into_the_same_weights(
    command: Run, pico: Path, work: Path, name: str
) -> None:
    words = ["b=0.5", "a", "--method", name, *needed(name), "--basis", "basis"]
    status, said, errors = command("blend", *words, "-o", "mix", "--json")
    assert status == 0, errors
    mix = load_adapter("mix")
    assert mix.info["method"] == json.loads(said)["method"] == name
    assert (
        mix.info["options"]
        == json.loads(said)["options"]
        == find_method(name).with_options(mix.info["options"]).options
    )
    assert command("merge", pico, *words, "-o", "one")[0] == 0
    assert command("merge", pico, "mix", "--basis", "basis", "-o", "two")[0] == 0
    one, two = (safetensors.torch.load_file(work / name / SINGLE) for name in ("one", "two"))
    assert all(torch.allclose(one[key], two[key], rtol=1e-5, atol=1e-6) for key in one)


def test_options_reach_the_method(command: Run, pico: Path, work: Path) -> None:
    flags = ["--seed", "5", "--no-rescale", "--lambda", "0.5", "--normalize"]
    flags += ["--density", "0.4", "--majority-sign", "frequency"]
    words = ("merge", pico, "a", "b", "--basis", "basis", "-o", "out", "--method", "dare-ties")
    assert command(*words, *flags)[0] == 0
    header = safetensors.safe_open(work / "out" / SINGLE, "pt").metadata()
    assert json.loads(header["lorasb.options"]) == {
        "density": 0.4,
        "seed": 5,
        "rescale": False,
        "majority_sign": "frequency",
        "lambda": 0.5,
        "normalize": True,
    }


@pytest.mark.parametrize("name", ["ties", "dare-linear", "slerp"])
def test_a_merge_can_be_verified_and_subtracted(
    command: Run, pico: Path, work: Path, name: str
) -> None:
    words = ("merge", pico, "a", "b", "--method", name, *needed(name), "--basis", "basis")
    status, said, errors = command(*words, "--verify", "--json", "-o", "plus")
    assert status == 0, errors
    assert json.loads(said)["verified"]["effect"] > 0.1
    assert command(*words, "--subtract", "-o", "minus")[0] == 0
    base, plus, minus = (
        safetensors.torch.load_file(f / SINGLE) for f in (pico, work / "plus", work / "minus")
    )
    assert any(not torch.equal(base[key], plus[key]) for key in base)
    for key, weight in base.items():
        assert torch.allclose(plus[key] + minus[key], 2 * weight, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "--t", "1"], "method linear: found option t, expected only normalize"),
        (["a", "b", "--method", "slerp", "--normalize"], "method slerp: found option normalize"),
        (["a", "--method", "slerp"], "method slerp: found 1 adapters, expected exactly 2"),
        (["a", "--method", "ties", "--no-rescale"], "method ties: found option rescale, expected"),
        (["a", "--method", "core-dare"], "method core-dare: found no density, expected one"),
        (["a", "--method", "ties", "--density", "20"], "density: found 20.0, expected"),
        (["a", "--method", "ties", "--majority-sign", "x"], "majority-sign: found 'x', expected"),
        (
            ["a=-1", "b", "--method", "ties", "--normalize"],
            "normalize: found weight -1.0",
        ),
    ],
)
def test_wrong_options_are_refused_by_both(
    command: Run, pico: Path, work: Path, words: list[str], message: str
) -> None:
    before = sorted(work.iterdir())
    for start in (["merge", pico], ["blend"]):
        if start == ["blend"]:
            words = [
                word.replace("ties", "core-ties") if word == "ties" else word for word in words
            ]
            message = message.replace("method ties", "method core-ties")
        status, said, errors = command(*start, *words, "--basis", "basis", "-o", "out")
        assert (status, said) == (2, "")
        assert message in errors.splitlines()[-1]
    assert sorted(work.iterdir()) == before


def test_a_seed_that_nothing_draws_from_is_refused(command: Run, pico: Path, work: Path) -> None:
    words = ["a", "--basis", "basis", "-o", "out", "--seed", "1"]
    status, _, errors = command("merge", pico, *words)
    assert status == 2 and "--seed needs --rounding stochastic or a method that draws" in errors
    status, _, errors = command("blend", *words)
    assert status == 2 and "method linear: found option seed, expected only normalize" in errors
    stochastic = ["--rounding", "stochastic", "--dtype", "bfloat16"]
    assert command("merge", pico, *words, *stochastic)[0] == 0
    header = safetensors.safe_open(work / "out" / SINGLE, "pt").metadata()
    assert json.loads(header["lorasb.options"]) == {"normalize": False}


def test_blend_tells_the_way_out(command: Run, work: Path) -> None:
    status, said, errors = command("blend", "a", "b", "--method", "ties", "-o", "out")
    assert (status, said, len(errors.splitlines())) == (2, "", 1)
    assert "method ties: found one that works on whole deltas and leaves the basis" in errors
    assert "core-ties" in errors and "or use `lorasb merge`" in errors
    status, _, errors = command("blend", "a", "b", "--method", "core-ties", "-o", "out")
    assert status == 2 and "method core-ties: found no basis" in errors
    assert not (work / "out").exists()
