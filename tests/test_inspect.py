"""`lorasb inspect`: its figures against full matrices, what it recognises, and its pictures."""

import json
import struct
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import random_adapter, random_basis
from conftest import Run
from foreign import dense, lora_config, save_latent, save_peft
from PIL import Image
from safetensors.torch import load_file, save_file

from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.packing import pack_store
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.basis import find_method
from lorasb_runtime.inspecting import collection
from lorasb_runtime.inspecting.distances import classical_map, distance_matrix
from lorasb_runtime.inspecting.inspection import ModuleRow
from lorasb_runtime.storage.adapter_file import Adapter, save_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis
from lorasb_runtime.storage.checkpoint import fingerprint, open_checkpoint
from lorasb_runtime.storage.tensor_file import header

NAMES = ("ann", "ben", "cat", "dan")


@pytest.fixture
def inspect(command: Run) -> Run:
    """Runs `lorasb inspect ...`."""
    return partial(command, "inspect")


@pytest.fixture(scope="module")
def straight(pico: Path) -> Basis:
    """Orthonormal, at scaling -2."""
    return random_basis(pico, scaling=-2.0)


@pytest.fixture(scope="module")
def skew(straight: Basis) -> Basis:
    """The same with A and B that are not orthonormal."""
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: t * (0.5 + torch.rand(t.shape, generator=generator))
        for name, t in straight.tensors.items()
    }
    return replace(straight, tensors=tensors)


def delta(basis: Basis, adapter: Adapter, index: int) -> torch.Tensor:
    module = basis.targets[index].module
    core = basis.core(adapter.cores, index).double()
    return basis.scaling * (basis.b(module).double() @ core @ basis.a(module).double())


def merged(basis: Basis, adapter: Adapter) -> torch.Tensor:
    """All deltas as one vector."""
    return torch.cat([delta(basis, adapter, i).flatten() for i in range(len(basis.targets))])


def adapters_of(basis: Basis) -> dict[str, Adapter]:
    return {name: random_adapter(basis, seed, 0.1, name) for seed, name in enumerate(NAMES)}


def write_folder(folder: Path, basis: Basis) -> Path:
    save_basis(basis, folder / "basis.safetensors")
    for name, adapter in adapters_of(basis).items():
        save_adapter(adapter, folder / f"{name}.safetensors")
    return folder


def look(inspect: Run, *words: object) -> dict[str, Any]:
    status, said, errors = inspect(*words, "--json")
    assert status == 0, errors
    found: dict[str, Any] = json.loads(said)
    return found


@pytest.mark.parametrize("kind", ["straight", "skew"])
def test_an_adapters_figures_are_those_of_its_deltas(
    inspect: Run, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    basis: Basis = request.getfixturevalue(kind)
    adapter = adapters_of(basis)["ann"]
    save_basis(basis, tmp_path / "basis")
    saved = save_adapter(adapter, tmp_path / "ann")
    told = look(inspect, tmp_path / "ann", "--basis", tmp_path / "basis")
    assert (told["kind"], told["version"], told["basis"]) == (
        "adapter",
        saved.version,
        basis.digest,
    )
    assert (told["targets"], told["ranks"], told["numbers"]) == (14, [4], basis.size)
    assert told["norm"] == pytest.approx(merged(basis, adapter).norm().item(), rel=1e-6)
    for index, row in enumerate(told["modules"]):
        values = torch.linalg.svdvals(delta(basis, adapter, index))[:4]
        assert row["spectrum"] == pytest.approx(values.tolist(), rel=1e-6)
        assert row["norm"] == pytest.approx(values.norm().item(), rel=1e-6)
        shares = values / values.sum()
        entropy = -(shares * shares.log()).sum()
        assert row["effective_rank"] == pytest.approx(entropy.exp().item(), rel=1e-6)
    bare = look(inspect, tmp_path / "ann")
    assert "modules" not in bare and "pass --basis" in bare["notes"][0]
    assert bare["core_norm"] == pytest.approx(adapter.cores.norm().item(), rel=1e-6)


def test_effective_rank_counts_equal_directions_and_is_zero_for_nothing() -> None:
    assert ModuleRow("m", 9, 9, 3, (2.0, 2.0, 2.0)).effective_rank == pytest.approx(3)
    assert ModuleRow("m", 9, 9, 3, (5.0, 0.0, 0.0)).effective_rank == pytest.approx(1)
    assert ModuleRow("m", 9, 9, 3, (0.0, 0.0, 0.0)).effective_rank == 0


def test_a_bases_spectrum_is_that_of_what_made_it(
    inspect: Run, straight: Basis, tmp_path: Path
) -> None:
    weights = {
        t.module: torch.randn(t.out_features, t.in_features, generator=torch.Generator())
        for t in straight.targets
    }
    for method, matrices in (
        ("lora-xs", weights),
        ("lora-sb", {m: w.sign() for m, w in weights.items()}),
    ):
        tensors = {}
        for module, weight in weights.items():
            pair = find_method(method).make_pair(weight, 4)
            tensors |= {f"{module}.A": pair.a, f"{module}.B": pair.b}
            tensors |= {} if pair.r0 is None else {f"{module}.R0": pair.r0}
        save_basis(replace(straight, tensors=tensors, method=method), tmp_path / method)
        told = look(inspect, tmp_path / method)
        scaling = 2 if method == "lora-sb" else 1
        assert told["method"] == method and told["orthonormal"] == (method == "lora-sb")
        for row in told["modules"]:
            values = torch.linalg.svdvals(matrices[row["module"]])[:4] * scaling
            assert row["spectrum"] == pytest.approx(values.tolist(), rel=1e-4)
    save_basis(straight, tmp_path / "plain")
    told = look(inspect, tmp_path / "plain")
    assert told["notes"] == ["B and A are orthonormal and without R0: no spectrum"]
    assert told["digest"] == straight.digest and "spectrum" not in told["modules"][0]


@pytest.mark.parametrize("kind", ["straight", "skew"])
def test_distances_are_those_of_the_merged_weights_wherever_the_adapters_lie(
    inspect: Run, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    basis: Basis = request.getfixturevalue(kind)
    folder = write_folder(tmp_path / "folder", basis)
    store = AdapterStore(str(tmp_path / "store"))
    for name in NAMES:
        store.publish(parse_name(name), (folder / f"{name}.safetensors").read_bytes())
    pack_store(store, tmp_path / "pack", None, lambda *_: None)
    weights = [merged(basis, adapter) for adapter in adapters_of(basis).values()]
    wanted = torch.stack([torch.stack([(x - y).norm() for y in weights]) for x in weights])
    flag = ("--basis", folder / "basis.safetensors")
    for words in ((folder,), (tmp_path / "store", *flag), (tmp_path / "pack", *flag)):
        told = look(inspect, *words)
        assert told["kind"] == "adapters" and told["basis"] == basis.digest
        assert torch.allclose(torch.tensor(told["distances"]).double(), wanted, rtol=1e-5)
        assert ("by the QR factors" in told["distance_of"]) == (kind == "skew")
        for index, row in enumerate(told["adapters"]):
            nearest = wanted[index].clone()
            nearest[index] = torch.inf
            assert row["name"] == NAMES[index]
            assert row["nearest"] == NAMES[int(nearest.argmin())]
            assert row["distance"] == pytest.approx(nearest.min().item(), rel=1e-5)
            assert row["norm"] == pytest.approx(weights[index].norm().item(), rel=1e-5)
    cores = [adapter.cores.double() for adapter in adapters_of(basis).values()]
    told = look(inspect, tmp_path / "store")
    assert "pass --basis" in told["distance_of"]
    assert told["distances"][0][1] == pytest.approx((cores[0] - cores[1]).norm().item(), rel=1e-6)


def test_what_does_not_belong_is_left_out_and_noted(
    inspect: Run, straight: Basis, skew: Basis, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "folder", straight)
    save_adapter(random_adapter(skew, 9), folder / "other.safetensors")
    damaged = bytearray((folder / "ben.safetensors").read_bytes())
    damaged[-4:] = struct.pack("<f", float("nan"))
    (folder / "ben.safetensors").write_bytes(damaged)
    told = look(inspect, folder)
    assert [row["name"] for row in told["adapters"]] == ["ann", "cat", "dan"]
    assert (told["adapters_in_all"], told["measured"]) == (5, 3)
    assert "ben.safetensors: found 1 NaN" in told["notes"][0]
    assert told["notes"][1] == "left out, as they are for another basis: 1"


def test_of_many_adapters_an_even_selection_is_measured(
    inspect: Run, straight: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(12):
        save_adapter(random_adapter(straight, index), tmp_path / f"{index:02}.safetensors")
    monkeypatch.setattr(collection, "MEASURED", 4)
    told = look(inspect, tmp_path)
    assert [row["name"] for row in told["adapters"]] == ["00", "02", "06", "10"]
    assert "4 of 12 adapters are measured, evenly chosen" in told["notes"]
    monkeypatch.setattr(collection, "MEMORY", 4 * straight.size * 2)  # two adapters' bytes
    assert look(inspect, tmp_path)["measured"] == 2


def test_a_merged_models_provenance_and_a_plain_models_lack_of_it(
    inspect: Run, command: Run, pico: Path, straight: Basis, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "folder", straight)
    words = ("--basis", folder / "basis.safetensors", "-o", tmp_path / "merged")
    assert command("merge", pico, folder / "ann.safetensors", *words)[0] == 0
    told = look(inspect, tmp_path / "merged")
    assert told["kind"] == "model" and told["model_type"] == "llama"
    assert told["fingerprint"] == fingerprint(open_checkpoint(tmp_path / "merged"))
    assert told["merged_from"]["basis"] == straight.digest
    assert [part["name"] for part in told["merged_from"]["adapters"]] == ["ann"]
    assert told["merged_from"]["base_model"]["fingerprint"] == fingerprint(open_checkpoint(pico))
    row = next(r for r in told["tensors"] if r["tensors"] == "model.layers.*.mlp.up_proj.weight")
    assert (row["count"], row["shape"], row["bytes"]) == (2, [64, 32], 2 * 64 * 32 * 4)
    plain = look(inspect, pico)
    assert plain["merged_from"] is None and "merged anything" in plain["notes"][0]


def test_what_shards_say_of_a_merge_may_be_more_and_must_agree(
    inspect: Run, pico: Path, tmp_path: Path
) -> None:
    tensors = load_file(pico / "model.safetensors")
    names, index = sorted(tensors), {}
    for shard, part, said in (
        ("a.safetensors", names[::2], {"method": "ties", "new": '["x"]', "source_dtypes": "{}"}),
        ("b.safetensors", names[1::2], {"method": "linear", "source_dtypes": '{"y": "F32"}'}),
    ):
        metadata = {f"lorasb.{key}": value for key, value in said.items()}
        save_file({name: tensors[name] for name in part}, tmp_path / shard, metadata)
        index |= {name: shard for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_bytes((pico / "config.json").read_bytes())
    card = tmp_path / "README.md"
    card.write_text("---\nbase_model: pico\ntags:\n- merge\nother: 1\n---\nText\n")
    told = look(inspect, tmp_path)
    assert told["merged_from"] == {"method": "ties", "new": '["x"]'}
    assert told["notes"] == [
        "warning: b.safetensors says another lorasb.method than the first shard"
    ]
    assert told["model_card"] == {"base_model": "pico", "tags": ["merge"]}
    assert told["fingerprint"] == look(inspect, pico)["fingerprint"]
    card.write_text("---\n[unclosed\n---\n")
    assert look(inspect, tmp_path)["model_card"] is None


def test_a_checkpoint_with_a_core_comes_with_a_warning(
    inspect: Run, pico: Path, tmp_path: Path
) -> None:
    latent = save_latent(pico, tmp_path / "latent", old_keys=True)
    told = look(inspect, latent)
    assert told["kind"] == "checkpoint" and told["frozen_basis"] is True
    assert "stock PEFT" in told["notes"][0] and "B A" in told["notes"][0]
    for row in told["modules"]:
        norm = dense(latent, row["module"]).norm().item()
        assert row["norm"] == pytest.approx(norm, rel=1e-6)
    plain = save_peft(pico, tmp_path / "plain", lora_config())
    told = look(inspect, plain)
    assert told["notes"] == [] and told["scaling"] == [2.0] and told["format"] == "peft-lora"
    norms = [dense(plain, row["module"], 2.0).norm().item() for row in told["modules"]]
    assert [row["norm"] for row in told["modules"]] == pytest.approx(norms, rel=1e-6)


def test_the_text_has_a_line_for_each_kind_of_module_or_for_each(
    inspect: Run, straight: Basis, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path, straight)
    flags = ("--basis", folder / "basis.safetensors")
    _, said, _ = inspect(folder / "ann.safetensors", *flags)
    assert f"basis: {straight.digest}" in said and "self_attn.q_proj" in said
    assert len([line for line in said.splitlines() if "_proj " in line]) == 7
    _, said, _ = inspect(folder / "ann.safetensors", *flags, "--modules")
    assert len([line for line in said.splitlines() if "_proj " in line]) == 14
    _, said, _ = inspect(folder)
    assert [line.split()[0] for line in said.splitlines()[-4:]] == list(NAMES)


def test_pictures_are_drawn_for_what_has_one(
    inspect: Run, straight: Basis, skew: Basis, pico: Path, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "folder", skew)
    flag = ("--basis", folder / "basis.safetensors")
    for name, words in {
        "spectra": (folder / "basis.safetensors",),
        "norms": (folder / "ann.safetensors", *flag),
        "map": (folder,),
    }.items():
        status, _, errors = inspect(*words, "--plot", tmp_path / f"{name}.png")
        assert status == 0, errors
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 400
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 100
    lora = save_peft(pico, tmp_path / "lora", lora_config())
    status, _, errors = inspect(lora, "--plot", tmp_path / "lora.svg")
    assert status == 0 and b"<svg" in (tmp_path / "lora.svg").read_bytes()[:2000]
    save_basis(straight, tmp_path / "plain")
    for words, text in (
        ((pico, "--plot", tmp_path / "no.png"), "found a model, expected a basis"),
        ((folder, "--plot", tmp_path / "no.xyz"), "expected a name ending in .png"),
        ((folder / "ann.safetensors", "--plot", tmp_path / "no.png"), "pass --basis"),
        ((tmp_path / "plain", "--plot", tmp_path / "no.png"), "no spectrum"),
    ):
        status, said, errors = inspect(*words)
        assert (status, said) == (2, "") and text in errors.splitlines()[-1]
    assert not list(tmp_path.glob("*no.*"))


def test_without_matplotlib_the_extra_is_named(
    inspect: Run, skew: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_basis(skew, tmp_path / "basis")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, said, errors = inspect(tmp_path / "basis", "--plot", tmp_path / "p.png")
    assert (status, said) == (2, "") and "pip install 'lorasb[plot]'" in errors
    assert inspect(tmp_path / "basis")[0] == 0


def test_what_is_nothing_of_ours_is_refused_in_one_line(
    inspect: Run, straight: Basis, pico: Path, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "folder", straight)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    lone = tmp_path / "parts" / "cluster-0"
    save_basis(straight, lone / "basis.safetensors")
    other = tmp_path / "other"
    save_basis(replace(straight, scaling=3.0), other)
    for words, text in (
        ((tmp_path / "none",), "no such file or folder"),
        ((tmp_path / "empty",), "nothing known in it"),
        ((tmp_path / "text",), "without a safetensors header"),
        ((pico / "model.safetensors",), "a safetensors file of format 'pt'"),
        ((lone,), "expected adapters beside it"),
        ((lone.parent,), "1 folders with a basis each (cluster-0, ...)"),
        ((pico, "--basis", other), "--basis: found it for a model"),
        ((folder, "--basis", other), "expected some for sha256:"),
        ((folder / "ann.safetensors", "--basis", other), "found an adapter for basis"),
    ):
        status, said, errors = inspect(*words)
        assert (status, said) == (2, "") and "Traceback" not in errors
        assert text in errors.splitlines()[-1]


def test_the_map_keeps_distances_that_fit_into_two_dimensions() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [5.0, 5.0]], dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(1))).Q
    gram = (points @ turned.double().t()) @ (points @ turned.double().t()).t()
    places, share = classical_map(gram)
    assert share == pytest.approx(1.0)
    assert torch.allclose(torch.cdist(places, places), distance_matrix(gram), atol=1e-6)
    assert distance_matrix(gram)[1, 2].item() == pytest.approx(5.0)
    one, share = classical_map(gram[:1, :1])
    assert (one.tolist(), share) == ([[0.0, 0.0]], 1.0)


def test_a_spectrum_that_is_no_list_of_numbers_is_refused(
    inspect: Run, straight: Basis, tmp_path: Path
) -> None:
    for number, spectrum in enumerate(([], {"x": 1}, {straight.targets[0].module: [1, "a", 2, 3]})):
        save_basis(replace(straight, info={"spectrum": spectrum}), tmp_path / str(number))
        assert "info" in header((tmp_path / str(number)).read_bytes())["__metadata__"]
        status, _, errors = inspect(tmp_path / str(number))
        assert status == 2 and "expected 4 numbers from zero up" in errors
