"""From a merged model back: every byte after a reversible merge, else what is certain."""

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from bases import basis_for, random_adapter, random_basis
from conftest import Run
from merging import merge, tensors_of
from pico import make_pico

from lorasb_runtime.merging.fold import Rounding
from lorasb_runtime.models.load import load_causal_lm
from lorasb_runtime.storage.adapter_file import save_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis
from lorasb_runtime.storage.checkpoint import INDEX, SINGLE
from lorasb_runtime.types import TargetModule

STOCHASTIC = Rounding(stochastic=True, seed=3)


@pytest.fixture
def bf16(pico: Path, tmp_path: Path) -> Path:
    """The pico model in bfloat16, with a card, and tensors that are no weights."""
    folder = tmp_path / "base"
    shutil.copytree(pico, folder)
    load_causal_lm(pico, torch.bfloat16).save_pretrained(folder)
    tensors = {**tensors_of(folder), "some.count": torch.arange(3), "some.flag": torch.ones(1) > 0}
    safetensors.torch.save_file(tensors, folder / SINGLE, {"format": "pt", "who": "é"})
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA base.\n")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def save(work: Path, basis: Basis, *seeds: int, strength: float = 1.0) -> list[Path]:
    save_basis(basis, work / "basis")
    for seed in seeds:
        save_adapter(random_adapter(basis, seed, strength), work / f"a{seed}")
    return [work / f"a{seed}" for seed in seeds]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"dtype": torch.float32},
    {"dtype": torch.float16},
    {"rounding": STOCHASTIC},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("strength", [1e-3, 3.0])
def test_a_reversible_merge_is_undone_byte_by_byte(
    options: dict[str, Any], strength: float, bf16: Path, tmp_path: Path, command: Run
) -> None:
    basis = random_basis(bf16, rank=4)
    merge(
        bf16,
        basis,
        tmp_path / "out",
        random_adapter(basis, 0, strength),
        reversible=True,
        **options,
    )
    status, out, err = command("unmerge", tmp_path / "out", "-o", tmp_path / "back", "--json")
    assert status == 0, err
    assert json.loads(out)["exact"] is True
    assert files(tmp_path / "back") == files(bf16)


def test_a_reversible_merge_of_shards_with_an_untied_head_is_undone(
    tmp_path: Path, command: Run
) -> None:
    base = make_pico("llama", tmp_path / "base", tie_word_embeddings=True)
    model = load_causal_lm(base)
    (base / SINGLE).unlink()
    model.save_pretrained(base, max_shard_size="20KB")
    assert (base / INDEX).is_file()
    basis = basis_for([TargetModule("lm_head", 4, 32, 259)])
    merge(base, basis, tmp_path / "out", random_adapter(basis, 0), untie=True, reversible=True)
    assert command("unmerge", tmp_path / "out", "-o", tmp_path / "back")[0] == 0
    assert files(tmp_path / "back") == files(base)


def test_small_changes_make_a_small_undo_file(bf16: Path, tmp_path: Path) -> None:
    basis = random_basis(bf16, rank=4)
    sizes = []
    for strength in (1e-4, 1.0):
        adapter = random_adapter(basis, 0, strength)
        merge(bf16, basis, tmp_path / "out", adapter, reversible=True, force=True)
        with zipfile.ZipFile(tmp_path / "out" / "lorasb_undo.zip") as archive:
            found = [i for i in archive.infolist() if i.filename.startswith("tensors/")]
        assert len(found) <= len(basis.targets)
        sizes.append(sum(i.compress_size for i in found))
    whole = sum(2 * t.in_features * t.out_features for t in basis.targets)
    assert 20 * sizes[0] < whole
    assert sizes[0] < sizes[1] < whole


def other_weights(out: Path) -> None:
    tensors = tensors_of(out)
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 4] += 1
    safetensors.torch.save_file(tensors, out / SINGLE)


def cut_short(out: Path) -> None:
    data = (out / "lorasb_undo.zip").read_bytes()
    (out / "lorasb_undo.zip").write_bytes(data[: len(data) // 2])


def flipped(out: Path) -> None:
    path = out / "lorasb_undo.zip"
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.filename.startswith("tensors/"))
    data = bytearray(path.read_bytes())
    data[info.header_offset + 200] ^= 0x55
    path.write_bytes(data)


def rewritten(change: Callable[[dict[str, bytes]], None]) -> Callable[[Path], None]:
    def rewrite(out: Path) -> None:
        with zipfile.ZipFile(out / "lorasb_undo.zip") as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        change(entries)
        with zipfile.ZipFile(out / "lorasb_undo.zip", "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, data)

    return rewrite


def about(**values: Any) -> Callable[[dict[str, bytes]], None]:
    def change(entries: dict[str, bytes]) -> None:
        said = json.loads(entries["undo.json"]) | values
        entries["undo.json"] = json.dumps(said).encode()

    return change


HEADER = f"headers/{SINGLE}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, "found weights that lorasb_undo.zip does not turn into model.safetensors"),
        (cut_short, "found damage"),
        (flipped, "found damage in"),
        (rewritten(lambda e: e.pop("undo.json")), "found damage in undo.json"),
        (rewritten(about(format="x")), "found format 'x', expected 'lorasb-undo'"),
        (rewritten(about(format_version="2")), "found format_version '2'"),
        (rewritten(about(shards={"../evil.safetensors": "0"})), "found shards of another kind"),
        (rewritten(about(shards=[])), "found shards of another kind"),
        (rewritten(lambda e: e.update({"undo.json": b"[]"})), "undo.json that is no JSON object"),
        (rewritten(lambda e: e.pop(HEADER)), f"found damage in {HEADER}"),
        (rewritten(lambda e: e.update({HEADER: b"x"})), "found a damaged header"),
        (
            rewritten(lambda e: e.update({HEADER: e[HEADER].replace(b"[0,", b"[9,", 1)})),
            "found a header of model.safetensors with gaps",
        ),
    ],
)
def test_a_damaged_undo_file_is_refused_and_leaves_nothing(
    change: Callable[[Path], None], message: str, bf16: Path, tmp_path: Path, command: Run
) -> None:
    basis = random_basis(bf16, rank=4)
    merge(bf16, basis, tmp_path / "out", random_adapter(basis, 0, 1e-2), reversible=True)
    change(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = command("unmerge", tmp_path / "out", "-o", tmp_path / "back")
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_what_subtraction_calls_certain_is_so(
    options: dict[str, Any], strength: float, bf16: Path, tmp_path: Path, command: Run
) -> None:
    basis = random_basis(bf16, rank=4, scaling=0.5)
    first, second = save(tmp_path, basis, 1, 2, strength=strength)
    flags = ["--dtype", str(options["dtype"])[6:]] if "dtype" in options else []
    flags += ["--rounding", "stochastic"] if "rounding" in options else []
    words = ("--basis", tmp_path / "basis")
    status, _, err = command(
        "merge", bf16, f"{first}=0.7", f"{second}=-0.3", *words, *flags, "-o", tmp_path / "out"
    )
    assert status == 0, err
    status, out, err = command(
        "unmerge", tmp_path / "out", second, first, *words, "-o", tmp_path / "back", "--json"
    )
    assert status == 0, err
    said = json.loads(out)
    before, after = tensors_of(bf16), tensors_of(tmp_path / "back")
    merged = tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    wrong = 0
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        module = name.removesuffix(".weight")
        different = int((tensor != after[name]).sum())
        wrong += different
        if module in said["modules"]:
            step = 2.0 ** (-7 if merged[name].dtype == torch.bfloat16 else -10)
            steps = (tensor.float() - after[name].float()).abs() / (
                merged[name].float().abs() * step
            )
            assert steps.nan_to_num().max() <= (2 if "rounding" in options else 1)
            assert different <= round((1 - said["modules"][module]) * tensor.numel())
        else:
            assert different == 0
    assert said["fingerprint_matches"] == (wrong == 0)
    wide = options.get("dtype") == torch.float32
    if strength == 1.0 and not wide:
        assert 0.1 < said["certain"] < 1
    if wide:
        assert said["certain"] == 1
        kept = files(tmp_path / "back")
        assert json.loads(kept["config.json"]) == json.loads(files(bf16)["config.json"])
        assert kept["README.md"] == files(bf16)["README.md"]
        with safetensors.safe_open(tmp_path / "back" / SINGLE, "pt") as file:
            assert file.metadata() == {"format": "pt", "who": "é"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lorasb.adapters": "[1]"}, "found lorasb.adapters [1], expected adapters with name"),
        ({"lorasb.adapters": '[{"name": "a", "version": "b"}]'}, "expected adapters with name"),
        ({"lorasb.adapters": "{"}, "expected valid JSON in it"),
        ({"lorasb.changes": "3"}, "found changes of another kind, expected a JSON object"),
        ({"lorasb.source_dtypes": "[]"}, "expected a JSON object"),
        ({"lorasb.earlier": "[]"}, "expected a JSON object"),
        ({"lorasb.method": "odd"}, "method: found 'odd'"),
        ({"lorasb.options": '{"density": 2}'}, "density"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(
    values: dict[str, str], message: str, bf16: Path, tmp_path: Path, command: Run
) -> None:
    basis = random_basis(bf16, rank=4)
    (adapter,) = save(tmp_path, basis, 0)
    words = (adapter, "--basis", tmp_path / "basis")
    assert command("merge", bf16, *words, "-o", tmp_path / "out")[0] == 0
    with safetensors.safe_open(tmp_path / "out" / SINGLE, "pt") as file:
        said = {**file.metadata(), **values}
    safetensors.torch.save_file(tensors_of(tmp_path / "out"), tmp_path / "out" / SINGLE, said)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = command("unmerge", tmp_path / "out", *words, "-o", tmp_path / "back")
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_an_untied_head_is_tied_again(tmp_path: Path, command: Run) -> None:
    base = make_pico("llama", tmp_path / "base", tie_word_embeddings=True)
    q0 = TargetModule("model.layers.0.self_attn.q_proj", 4, 32, 32)
    basis = basis_for([TargetModule("lm_head", 4, 32, 259), q0])
    (adapter,) = save(tmp_path, basis, 0)
    words = (adapter, "--basis", tmp_path / "basis")
    flags = ("--untie", "--dtype", "float32")
    assert command("merge", base, *words, *flags, "-o", tmp_path / "out")[0] == 0
    assert command("unmerge", tmp_path / "out", *words, "-o", tmp_path / "back")[0] == 0
    before, after = tensors_of(base), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"]
    for name, tensor in before.items():
        assert torch.allclose(tensor, after[name], rtol=0, atol=2e-7)


def test_of_two_merges_the_last_is_taken_out_first(
    bf16: Path, tmp_path: Path, command: Run
) -> None:
    basis = dataclasses.replace(random_basis(bf16, rank=4), base_model=None)
    first, second = save(tmp_path, basis, 1, 2)
    words = ("--basis", tmp_path / "basis", "--dtype", "float32")
    assert command("merge", bf16, first, *words, "-o", tmp_path / "one")[0] == 0
    assert command("merge", tmp_path / "one", second, *words, "-o", tmp_path / "two")[0] == 0
    status, _, err = command(
        "unmerge", tmp_path / "two", first, *words[:2], "-o", tmp_path / "back"
    )
    assert (status, "found none of version" in err) == (2, True)
    for model, adapter, output in (("two", second, "first"), ("first", first, "back")):
        status, _, err = command(
            "unmerge", tmp_path / model, adapter, *words[:2], "-o", tmp_path / output
        )
        assert status == 0, err
    one, again = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "first")
    assert all(torch.allclose(one[n], again[n].to(one[n].dtype), atol=1e-6) for n in one)
    before, after = tensors_of(bf16), tensors_of(tmp_path / "back")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base", "a1", "--basis", "basis"], "found no record of a merge in it"),
        (["out"], "found no lorasb_undo.zip, expected one (merge --reversible writes it), or"),
        (["out", "a1"], "found no lorasb_undo.zip"),
        (["out", "--basis", "basis"], "found no lorasb_undo.zip"),
        (["out", "a2", "--basis", "basis"], "found none of version"),
        (["out", "a1", "a2", "--basis", "basis"], "adapter 'a2': found version"),
        (["out", "b1", "--basis", "other"], "basis: found sha256:"),
        (["undoable", "a1", "--basis", "basis"], "expected neither --basis nor adapters"),
        (["nothing"], "nothing"),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    words: list[str],
    message: str,
    bf16: Path,
    tmp_path: Path,
    command: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    basis, other = random_basis(bf16, rank=4), random_basis(bf16, rank=4, seed=5)
    save(tmp_path, basis, 1, 2)
    save_basis(other, tmp_path / "other")
    save_adapter(random_adapter(other, 1), tmp_path / "b1")
    merge(bf16, basis, tmp_path / "out", random_adapter(basis, 1))
    merge(bf16, basis, tmp_path / "undoable", random_adapter(basis, 1), reversible=True)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = command("unmerge", *words, "-o", "back")
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before
