"""What cannot be imported is refused by name with the way out; hostile files do no harm."""

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from foreign import CONFIG, PREFIX, WEIGHTS, lora_config, rewrite, save_peft, set_config, tensors_of
from peft import LoKrConfig, LoraConfig, PeftConfig, PrefixTuningConfig

from lorasb_runtime.errors import FileFormatError, InputError, NotFoundError, TooLargeError
from lorasb_runtime.importing.run import ImportConfig, import_checkpoints
from lorasb_runtime.storage import json_file

Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture
def lora(pico: Path, tmp_path: Path) -> Path:
    return save_peft(pico, tmp_path / "alice", lora_config())


def refused(folder: Path, message: str, kind: type[InputError] = InputError) -> str:
    """The one line of the refusal; nothing was written."""
    output = folder.parent / "out"
    with pytest.raises(kind, match=message) as refusal:
        import_checkpoints([folder], ImportConfig(), output)
    assert not output.exists()
    said = str(refusal.value)
    assert "\n" not in said and str(folder) in said
    return said


PEFTS: dict[str, tuple[PeftConfig, str]] = {
    "dora": (lora_config(use_dora=True), "found use_dora, expected none; merge it into its base"),
    "bias": (lora_config(bias="all"), "found trained biases; train with bias='none'"),
    "lora_bias": (lora_config(lora_bias=True), "found lora_bias, .*train with lora_bias=False"),
    "modules": (lora_config(modules_to_save=["lm_head"]), "found modules_to_save, .*train without"),
    "tokens": (lora_config(trainable_token_indices=[1, 2]), "found trainable_token_indices"),
    "embeddings": (
        lora_config(target_modules=["embed_tokens", "q_proj"]),
        "embed_tokens.*pass --model|a LoRA of an embedding",
    ),
    "alora": (
        lora_config(task_type="CAUSAL_LM", alora_invocation_tokens=[5]),
        "found alora_invocation_tokens",
    ),
    "pissa": (lora_config(init_lora_weights="pissa"), "'pissa', which changes the base .*_convers"),
    "olora": (lora_config(init_lora_weights="olora"), "found init_lora_weights 'olora'"),
    "lokr": (LoKrConfig(r=2, target_modules=["q_proj"]), "'LOKR', .*with PEFT's save_as_lora"),
    "prefix": (
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "found peft_type 'PREFIX_TUNING', expected LORA, ADALORA or TINYLORA; merge it",
    ),
    "replicated": (lora_config(layer_replication=[(0, 2), (1, 2)]), "found layer_replication"),
}


@pytest.mark.parametrize("kind", PEFTS)
def test_what_is_not_linear_in_the_weights_is_refused_by_name(
    kind: str, pico: Path, tmp_path: Path
) -> None:
    config, message = PEFTS[kind]
    refused(save_peft(pico, tmp_path / kind, config), message)


@pytest.mark.parametrize(
    "field",
    [
        {"kasa_config": {"beta": 0.1}},
        {"arrow_config": {"top_k": 2}},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"monteclora_config": {"num_samples": 4}},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "loftq"},
        {"use_something_new": True},
    ],
)
def test_fields_that_change_the_adapter_are_refused_by_name(
    field: dict[str, Any], lora: Path
) -> None:
    """Of variants that PEFT makes only on other models or devices the field says enough."""
    set_config(lora, **field)
    refused(lora, f"found '?{next(iter(field))}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{Q}.lora_magnitude_vector", "DoRA's magnitudes"),
        (f"{Q}.lora_B.bias", "a bias beside lora_B"),
        (f"{Q}.lora_diag", "KaSA's diagonal"),
        (f"{PREFIX}model.embed_tokens.lora_embedding_A", "a LoRA of an embedding"),
        (f"{PREFIX}lm_head.modules_to_save.weight", "fully trained modules"),
        (f"{PREFIX}lm_head.weight", "found a tensor .*lm_head.weight'"),
        (f"{PREFIX}model.x.token_adapter.trainable_tokens_delta", "trained token embeddings"),
    ],
)
def test_tensors_beside_the_loras_are_refused_by_name(name: str, message: str, lora: Path) -> None:
    rewrite(lora, {**tensors_of(lora), name: torch.ones(4)})
    refused(lora, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": "4"}, "found r '4', expected a whole number above zero"),
        ({"r": 0}, "found r 0, expected a whole number"),
        ({"r": True}, "found r True"),
        ({"r": ...}, "found r None"),
        ({"lora_alpha": "8"}, "found lora_alpha '8', expected a number"),
        ({"lora_alpha": float("nan")}, "found lora_alpha nan"),
        ({"lora_alpha": float("inf")}, "found lora_alpha inf"),
        ({"lora_alpha": 10**400}, "found lora_alpha 1000"),
        ({"lora_alpha": 0}, "found a scaling of 0 for model"),
        ({"use_rslora": 1}, "found use_rslora 1, expected bool"),
        ({"rank_pattern": []}, r"found rank_pattern \[\], expected an object"),
        ({"rank_pattern": {"q_proj": "4"}}, "found rank_pattern .* expected whole numbers"),
        ({"rank_pattern": {"q_proj": -1}}, "found rank_pattern"),
        ({"rank_pattern": {"(": 4}}, "expected a regular expression"),
        ({"alpha_pattern": {"q_proj": [1]}}, "found alpha_pattern"),
        ({"fan_in_fan_out": "yes"}, "found fan_in_fan_out 'yes', expected bool"),
        ({"base_model_name_or_path": 5}, "found base_model_name_or_path 5, expected str"),
        ({"base_model_name_or_path": "a\nb\x1b[2J"}, "expected a printable name"),
        ({"bias": 3}, "found bias 3, expected str"),
        ({"peft_type": ["LORA"]}, r"found peft_type \['LORA'\]"),
        ({"peft_type": ...}, "found peft_type None"),
    ],
)
def test_a_configuration_of_wrong_types_is_refused(
    changes: dict[str, Any], message: str, lora: Path
) -> None:
    set_config(lora, **changes)
    refused(lora, message)


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


def test_a_folder_without_a_checkpoint_says_what_is_in_it(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "found no checkpoint that is known, expected adapter_config.json")
    refused(tmp_path / "none", "no such folder", NotFoundError)
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"")
    refused(file, "found a file, expected the folder of a checkpoint", FileFormatError)
    save_peft(pico, tmp_path / "runs" / "one", LoraConfig(target_modules=["q_proj"]))
    refused(tmp_path / "runs", r"found 1 checkpoints in folders inside \(one, \.\.\.\)")
    with pytest.raises(InputError, match=r"found a whole model, .*pass --from-merged and --model"):
        import_checkpoints([pico], ImportConfig(), tmp_path / "out")
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path / "empty", r"found a pickle.*'model\.safetensors'\)$", FileFormatError)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ImportConfig(from_merged=True, rank=4), "--from-merged needs --model"),
        (ImportConfig(from_merged=True, model="x"), "needs either --rank or --basis"),
        (ImportConfig(rank=4), "--rank goes with --from-merged"),
        (ImportConfig(prefix=4), "--prefix goes with --boosters"),
        (ImportConfig(boosters=True, from_merged=True, model="x", rank=1), "at most one of"),
        (ImportConfig(max_error=-1.0), "--max-error: found -1.0, expected 0 or more"),
        (ImportConfig(max_error=float("nan")), "--max-error: found nan"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    config: ImportConfig, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        import_checkpoints([tmp_path], config, tmp_path / "out")
