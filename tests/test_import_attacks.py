"""Hostile files: sizes, names, numbers and kinds that no checkpoint has are refused, harmlessly."""

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from foreign import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    lora_config,
    rewrite,
    save_peft,
    set_config,
    tensors_of,
)
from imports import refused

from lorasb_runtime.errors import FileFormatError, InputError, NotFoundError, TooLargeError
from lorasb_runtime.importing.run import ImportConfig, import_checkpoints
from lorasb_runtime.storage import json_file

Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture
def lora(pico: Path, tmp_path: Path) -> Path:
    return save_peft(pico, tmp_path / "alice", lora_config())


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)(a|a)(a|a)(a|a)", ".*.*.*.*x", r"(a)\1", "a" * 300]
)
def test_an_expression_that_could_run_for_ever_is_refused(pattern: str, lora: Path) -> None:
    set_config(lora, alpha_pattern={pattern: 4})
    refused(lora, "expected module names, or expressions with at most 3 groups and repetitions")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found no JSON"),
        (b"[1]", "found another kind of JSON"),
        (b"[" * 100_000, "found no JSON .nested too deeply"),
        (b"\xff\xfe\xff", "found no JSON"),
        (b'{"r": ' + b"1" * 5000 + b"}", "found no JSON"),
    ],
)
def test_a_configuration_that_is_no_json_object_is_refused(
    content: bytes, message: str, lora: Path
) -> None:
    (lora / CONFIG).write_bytes(content)
    refused(lora, message, FileFormatError)


def test_a_configuration_without_end_is_not_read(
    lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_file, "MAX_BYTES", 100)
    refused(lora, "bytes of JSON, expected at most 100", TooLargeError)


@pytest.mark.parametrize(
    "module",
    ["..", "../../x", "a..b", "/etc/passwd", "a b", "", "q\u0435_proj", "a\x00b", "x" * 300],
)
def test_names_that_no_module_has_are_refused(module: str, lora: Path) -> None:
    for side, shape in (("A", (4, 32)), ("B", (32, 4))):
        added = {f"{PREFIX}{module}.lora_{side}.weight": torch.ones(shape)}
        rewrite(lora, {**tensors_of(lora), **added})
    refused(lora, "expected parts of|expected at most 256", FileFormatError)


def test_a_module_under_two_spellings_is_refused(lora: Path) -> None:
    tensors = tensors_of(lora)
    twice = tensors[f"{Q}.lora_A.weight"].clone()
    rewrite(lora, {**tensors, f"{Q}.lora_A.default.weight": twice})
    refused(lora, r"both the lora_A of model\.layers\.0.*, expected each module once")
    rewrite(lora, {**tensors, f"{Q.removeprefix(PREFIX)}.lora_A.weight": twice})
    refused(lora, "both the lora_A of model", FileFormatError)
    live = {
        n.replace(".weight", ".bob.weight", 1) if "v_proj" in n else n: t
        for n, t in tensors.items()
    }
    rewrite(lora, {n.replace("q_proj.lora_A", "q_proj.lora_A.eve"): t for n, t in live.items()})
    refused(lora, r"adapters named \['bob', 'eve'\], expected one")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(4, 32, 1), r"of shape \[4, 32, 1\], expected 2 dimensions"),
        (torch.ones(0, 32), r"of shape \[0, 32\], expected 2 dimensions, none of them empty"),
        (torch.ones(3, 32), "expected one rank in both"),
        (torch.ones(4, 32, dtype=torch.float64), "of dtype F64"),
        (torch.ones(4, 32, dtype=torch.float8_e4m3fn), "of dtype F8_E4M3"),
        (torch.ones(4, 32, dtype=torch.bool), "of dtype BOOL"),
        (torch.ones(4, 32) / 0, "found NaN or Inf in"),
    ],
)
def test_damaged_loras_are_refused(tensor: torch.Tensor, message: str, lora: Path) -> None:
    rewrite(lora, {**tensors_of(lora), f"{Q}.lora_A.weight": tensor})
    refused(lora, message, FileFormatError)


def hostile(header: dict[str, Any], size: int = 64) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def entry(shape: list[int], begin: int = 0, end: int = 64, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04}.",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 1 << 40) + b"{}",
        hostile({f"{Q}.lora_A.weight": entry([2**40, 2**40])}),
        hostile({f"{Q}.lora_A.weight": entry([2**63, 2])}),
        hostile({f"{Q}.lora_A.weight": entry([4, 4], 0, 1 << 40)}),
        hostile({f"{Q}.lora_A.weight": entry([4, -4])}),
        hostile({f"{Q}.lora_A.weight": entry([4, 4]), f"{Q}.lora_B.weight": entry([4, 4])}),
        hostile({f"{Q}.lora_A.weight": {"dtype": "F32"}}),
        hostile({f"{Q}.lora_A.weight": entry([4, 4], dtype="F99")}),
    ],
)
def test_headers_that_lie_are_refused(content: bytes, lora: Path) -> None:
    (lora / WEIGHTS).write_bytes(content)
    refused(lora, "does not parse|expected", FileFormatError)


def test_a_name_twice_in_a_header_is_refused(lora: Path) -> None:
    parts = [f'"{Q}.lora_A.weight":{json.dumps(entry([4, 4]))}' for _ in range(2)]
    text = ("{" + ",".join(parts) + "}").encode()
    (lora / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    refused(lora, "does not parse|expected its lora_B as well", FileFormatError)


def test_an_empty_tensor_of_a_huge_shape_takes_no_memory(lora: Path) -> None:
    empty = {f"{Q}.lora_{side}.weight": entry([0, 2**62], 0, 0) for side in "AB"}
    (lora / WEIGHTS).write_bytes(hostile(empty, 0))
    refused(lora, "none of them empty", FileFormatError)


def test_a_rank_above_every_dimension_takes_no_square_of_it(tmp_path: Path, lora: Path) -> None:
    """A million directions for one weight: nothing of the size of rank times rank is formed."""
    rank = 1_000_000
    sides = {f"{Q}.lora_A.weight": torch.ones(rank, 1), f"{Q}.lora_B.weight": torch.ones(1, rank)}
    rewrite(lora, sides)
    set_config(lora, r=rank, lora_alpha=1)
    result = import_checkpoints([lora], ImportConfig(), tmp_path / "out")
    assert result.adapters[0].adapter.cores.tolist() == pytest.approx([1.0])


def test_pickles_are_never_read(lora: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(lora / "exploded"),)

    (lora / WEIGHTS).unlink()
    (lora / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    said = refused(lora, "adapter_model.bin: found a pickle, which can run code", FileFormatError)
    assert not (lora / "exploded").exists()
    # the way out is code that works
    tensors = {"x": torch.ones(2, 2).t()}
    torch.save(tensors, lora / "adapter_model.bin")
    code = said.partition("where you trust it: ")[2]
    previous = os.getcwd()
    os.chdir(lora)
    try:
        exec(code, {})
    finally:
        os.chdir(previous)
    assert torch.equal(safetensors.torch.load_file(lora / WEIGHTS)["x"], tensors["x"])


def test_links_are_followed_to_files_alone(lora: Path, tmp_path: Path) -> None:
    """The hub's cache links each file to a blob elsewhere; a device or pipe would never end."""
    blob = tmp_path / "blob"
    (lora / WEIGHTS).rename(blob)
    (lora / WEIGHTS).symlink_to("../blob")
    import_checkpoints([lora], ImportConfig(), tmp_path / "linked")
    for target in ("/dev/zero", "/dev/null", str(tmp_path)):
        for name in (WEIGHTS, CONFIG):
            kept = (lora / name).read_bytes()
            (lora / name).unlink()
            (lora / name).symlink_to(target)
            refused(lora, "expected a regular file", FileFormatError)
            (lora / name).unlink()
            (lora / name).write_bytes(kept)
    (lora / WEIGHTS).unlink()
    os.mkfifo(lora / WEIGHTS)
    refused(lora, "found a device, pipe or socket", FileFormatError)
    (lora / WEIGHTS).unlink()
    (lora / WEIGHTS).symlink_to(WEIGHTS)
    refused(lora, "expected a regular file", FileFormatError)
    (lora / WEIGHTS).unlink()
    (lora / WEIGHTS).symlink_to("nowhere")
    refused(lora, "no such file; expected safetensors weights", NotFoundError)


def test_an_output_that_is_a_link_is_not_written_through(lora: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "diary.safetensors").write_text("dear diary")
    (tmp_path / "link").symlink_to(victim)
    with pytest.raises(InputError, match="something other than a folder"):
        import_checkpoints([lora], ImportConfig(), tmp_path / "link", force=True)
    assert [p.name for p in victim.iterdir()] == ["diary.safetensors"]
