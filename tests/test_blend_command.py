"""`lorasb blend` from the command line: what it writes, what it says, what it refuses."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Run

from lorasb_runtime.storage.adapter_file import Adapter, load_adapter, save_adapter

BASIS = "sha256:" + "0" * 64


@pytest.fixture
def blend(command: Run) -> Run:
    """Runs `lorasb blend ...`."""
    return partial(command, "blend")


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return write(tmp_path / "one.safetensors", 1.0, torch.bfloat16)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return write(tmp_path / "two.safetensors", 2.0, torch.float16)


def write(path: Path, value: float, dtype: torch.dtype, basis: str = BASIS) -> Path:
    save_adapter(Adapter(torch.full((5,), value, dtype=dtype), basis, path.stem), path)
    return path


def test_the_output_says_what_it_is_of(blend: Run, one: Path, two: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "mix.safetensors"
    status, said, _ = blend(f"{two}=-0.25", one, "-o", output, "--json")
    assert status == 0
    told = json.loads(said)
    mix = load_adapter(output)
    assert mix.cores.dtype == torch.float32 and mix.cores.tolist() == [0.5] * 5
    assert (mix.name, mix.basis) == ("mix", told["basis"]) == ("mix", BASIS)
    assert mix.version == told["version"]
    expected = [
        {"name": "one", "version": load_adapter(one).version, "weight": 1.0},
        {"name": "two", "version": load_adapter(two).version, "weight": -0.25},
    ]
    assert mix.info["blend"] == told["adapters"] == sorted(expected, key=lambda p: p["version"])


def test_normalize_and_dtype_are_kept_to(blend: Run, one: Path, two: Path, tmp_path: Path) -> None:
    output = tmp_path / "mix.safetensors"
    flags = ("--normalize", "--dtype", "bfloat16", "--name", "half")
    status, said, _ = blend(one, f"{two}=3", "-o", output, *flags)
    assert status == 0 and "linear normalize=True" in said and "+3 * two" in said
    mix = load_adapter(output)
    assert mix.cores.dtype == torch.bfloat16 and mix.cores.tolist() == [1.75] * 5
    assert mix.name == "half"
    assert {part["weight"] for part in mix.info["blend"]} == {1.0, 3.0}
    assert mix.info["options"] == {"normalize": True}


def test_a_file_is_replaced_only_by_force(blend: Run, one: Path, two: Path) -> None:
    before = two.read_bytes()
    status, _, errors = blend(one, "-o", two)
    assert status == 2 and "already exists" in errors
    assert two.read_bytes() == before
    status, _, _ = blend(one, f"{two}=2", "-o", two, "--force")
    assert status == 0 and load_adapter(two).cores.tolist() == [5.0] * 5
    assert sorted(p.name for p in two.parent.iterdir()) == [one.name, two.name]


def test_bad_input_is_one_line_and_leaves_nothing(blend: Run, one: Path, tmp_path: Path) -> None:
    odd = write(tmp_path / "odd.safetensors", 1.0, torch.float32, "sha256:" + "1" * 64)
    output = tmp_path / "out.safetensors"
    for words, text in (
        ((f"{one}=nan",), "expected FILE=WEIGHT"),
        ((f"{one}=1e308", f"{one}=1e308"), "a finite number of float32's range"),
        ((f"{one}=3e38", f"{one}=3e38"), "do not fit float32"),
        ((one, odd), "found one for basis sha256:1"),
        ((tmp_path / "none",), "no such file"),
        ((one, "--dtype", "int8"), "found 'int8'"),
        ((f"{one}=0", "--normalize"), "found a sum of 0"),
        ((), "Missing argument"),
    ):
        status, said, errors = blend(*words, "-o", output)
        assert (status, said, len(errors.splitlines())) == (2, "", 1), errors
        assert text in errors
        assert not output.exists()
    status, _, errors = blend(one, "-o", tmp_path)
    assert status == 2 and "found a folder" in errors
