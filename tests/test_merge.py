"""Merging into checkpoints: right weights, nothing else changed, and whole or not at all."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from bases import basis_for, random_adapter, random_basis, reference_logits
from huggingface_hub import ModelCard
from merging import exact_delta, is_rounded_sum, merge, tensors_of
from pico import make_pico_llama
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasb_runtime.errors import BasisMismatchError, InputError
from lorasb_runtime.merging import fold
from lorasb_runtime.merging.delta import core_deltas
from lorasb_runtime.merging.fold import Rounding, fold_target
from lorasb_runtime.merging.fold_model import fold_into_model
from lorasb_runtime.merging.weighted import WeightedAdapter
from lorasb_runtime.models.load import load_causal_lm
from lorasb_runtime.models.targets import weight_of
from lorasb_runtime.ops.core_matmul import scale_core
from lorasb_runtime.storage import tensor_file
from lorasb_runtime.storage.adapter_file import Adapter
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.checkpoint import INDEX, SINGLE, fingerprint, open_checkpoint
from lorasb_runtime.types import TargetModule

TOKENS = [5, 90, 17, 200, 33, 41, 7, 64]


def logits(folder: Path) -> torch.Tensor:
    return reference_logits(folder, random_basis(folder, 1), None, TOKENS)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-5 * expected.abs().max())


def reshard(source: Path, folder: Path) -> Path:
    """A copy of a model folder whose weights lie in several shards."""
    shutil.copytree(source, folder)
    (folder / SINGLE).unlink()
    load_causal_lm(source).save_pretrained(folder, max_shard_size="20KB")
    assert len(open_checkpoint(folder).shards) > 2
    return folder


@pytest.fixture(scope="module")
def basis(pico: Path) -> Basis:
    return random_basis(pico, rank=4, scaling=0.5)


@pytest.fixture(scope="module")
def adapter(basis: Basis) -> Adapter:
    return random_adapter(basis, 0)


@pytest.fixture(scope="module")
def pico_bf16(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model in bfloat16, with two tensors beside its own."""
    folder = tmp_path_factory.mktemp("models") / "pico-bf16"
    shutil.copytree(pico, folder)
    load_causal_lm(pico, torch.bfloat16).save_pretrained(folder)
    tensors = {**tensors_of(folder), "some.count": torch.arange(3), "some.odd": torch.ones(3)}
    safetensors.torch.save_file(tensors, folder / SINGLE, {"format": "pt"})
    return folder


def test_the_merged_model_gives_the_reference_logits(
    pico: Path, basis: Basis, adapter: Adapter, tmp_path: Path
) -> None:
    report = merge(pico, basis, tmp_path / "out", adapter)
    expected = reference_logits(pico, basis, adapter, TOKENS)
    assert close(logits(tmp_path / "out"), expected)
    assert (logits(pico) - expected).abs().max() > 0.1 * expected.abs().max()
    assert list(report.modules) == [t.module for t in basis.targets]
    assert report.total.kept == pytest.approx(1.0, abs=1e-6)
    assert report.total.relative_error < 1e-6


def test_weighted_adapters_give_the_weighted_sum_of_their_deltas(
    pico: Path, basis: Basis, tmp_path: Path
) -> None:
    weights = {1: 0.7, 2: -0.3, 3: 1.5}
    items = [WeightedAdapter(random_adapter(basis, i), w) for i, w in weights.items()]
    merge(pico, basis, tmp_path / "out", *items)
    merge(pico, basis, tmp_path / "again", *reversed(items))
    total = torch.stack([i.weight * i.adapter.cores.double() for i in items]).sum(0)
    summed = dataclasses.replace(items[0].adapter, cores=total)
    assert close(logits(tmp_path / "out"), reference_logits(pico, basis, summed, TOKENS))
    first, second = ((tmp_path / name / SINGLE).read_bytes() for name in ("out", "again"))
    assert first == second


def test_only_targets_change_and_all_else_is_copied(
    pico: Path, basis: Basis, adapter: Adapter, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(pico, model)
    (model / "README.md").write_text("hello")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("{{ 1 }}")
    unwanted = (
        "lorasb_undo.zip",
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "x.bin",
        ".git",
    )
    for name in unwanted:
        (model / name).write_bytes(b"stale")
    merge(model, basis, tmp_path / "out", adapter)
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    targets = {f"{t.module}.weight" for t in basis.targets}
    assert {n for n in before if not torch.equal(before[n], after[n])} == targets
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    kept = {p.relative_to(model) for p in model.rglob("*")} - {Path(n) for n in unwanted}
    new = {Path("BASE_README.md"), Path("lorasb_merge.json")}
    assert {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*")} == kept | new
    for path in kept - {Path(SINGLE), Path("README.md")}:
        if (model / path).is_file():
            assert (tmp_path / "out" / path).read_bytes() == (model / path).read_bytes()
    assert (tmp_path / "out" / "BASE_README.md").read_text() == "hello"
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"


def test_sharding_order_and_index_are_kept(
    pico: Path, basis: Basis, adapter: Adapter, tmp_path: Path
) -> None:
    model = reshard(pico, tmp_path / "model")
    merge(model, basis, tmp_path / "out", adapter)
    merge(pico, basis, tmp_path / "single", adapter)
    whole, parts = tensors_of(tmp_path / "single"), tensors_of(tmp_path / "out")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    index = json.loads((model / INDEX).read_text())
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == index
    for shard in set(index["weight_map"].values()):
        source, _ = tensor_file.read_header(model / shard)
        found, start = tensor_file.read_header(tmp_path / "out" / shard)
        assert list(found)[1:] == [name for name in source if name != "__metadata__"]
        assert start % 8 == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    merge(model, basis, tmp_path / "half", adapter, dtype=torch.bfloat16)
    total = json.loads((tmp_path / "half" / INDEX).read_text())["metadata"]["total_size"]
    assert 2 * total == index["metadata"]["total_size"]


def test_a_shard_keeps_its_metadata_and_says_where_it_came_from(
    pico: Path, basis: Basis, adapter: Adapter, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(pico, model)
    safetensors.torch.save_file(tensors_of(pico), model / SINGLE, {"format": "pt", "who": "é"})
    merge(model, basis, tmp_path / "out", adapter)
    with safe_open(tmp_path / "out" / SINGLE, "pt") as file:
        found = file.metadata()
    assert {key: found.pop(key) for key in ("format", "who")} == {"format": "pt", "who": "é"}
    assert found.pop("lorasb.basis") == basis.digest
    assert {key.partition(".")[0] for key in found} == {"lorasb"}


def test_the_model_card_and_the_report_say_what_was_merged(
    pico_bf16: Path, basis: Basis, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(pico_bf16, model)
    (model / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n---\nA base.\n")
    basis = random_basis(model, rank=4)
    items = [WeightedAdapter(random_adapter(basis, i), w) for i, w in ((1, 0.5), (2, -2.0))]
    report = merge(model, basis, tmp_path / "out", *items, dtype=torch.float16)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    said = card.data.to_dict()
    assert (said["base_model"], said["license"], said["language"]) == ("model", "mit", ["en"])
    assert {"lorasb", "merge"} <= set(said["tags"])
    assert ModelCard.load(tmp_path / "out" / "BASE_README.md").text.strip() == "A base."
    written = json.loads((tmp_path / "out" / "lorasb_merge.json").read_text())
    assert written["modules"].keys() == report.modules.keys()
    assert written["total"]["kept"] == report.total.kept
    assert written["changes"] == {"dtype": "float16"}
    assert {a["version"]: a["weight"] for a in written["adapters"]} == {
        item.adapter.version: item.weight for item in items
    }
    for text in (basis.digest, "linear", *(item.adapter.version for item in items)):
        assert text in card.text
    merge(tmp_path / "out", dataclasses.replace(basis, base_model=None), tmp_path / "twice", *items)
    again = json.loads((tmp_path / "twice" / "lorasb_merge.json").read_text())
    assert again["base_model"]["name"] == "out"
    assert "changes" not in again


@pytest.mark.parametrize("card", [b"", b"---\n: : [\n---\n", b"---\n- a\n---\n", b"\xff\xfe"])
def test_a_base_card_that_nobody_can_read_is_no_obstacle(
    pico: Path, basis: Basis, adapter: Adapter, tmp_path: Path, card: bytes
) -> None:
    shutil.copytree(pico, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_bytes(card)
    merge(tmp_path / "model", basis, tmp_path / "out", adapter)
    assert (tmp_path / "out" / "BASE_README.md").read_bytes() == card
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "model"


def test_gpt2_weights_lie_the_other_way_round(pico_gpt2: Path, tmp_path: Path) -> None:
    basis = random_basis(pico_gpt2, rank=3)
    adapter = random_adapter(basis, 0)
    assert any(t.transposed and t.in_features != t.out_features for t in basis.targets)
    merge(pico_gpt2, basis, tmp_path / "out", adapter)
    expected = reference_logits(pico_gpt2, basis, adapter, TOKENS)
    assert close(logits(tmp_path / "out"), expected)
    model = load_causal_lm(pico_gpt2)
    fold_into_model(model, basis, adapter.cores)
    merged = load_causal_lm(tmp_path / "out").state_dict()
    assert all(torch.equal(merged[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_output_dtype_can_be_chosen(
    pico_bf16: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    basis = random_basis(pico_bf16, rank=4)
    report = merge(pico_bf16, basis, tmp_path / "out", random_adapter(basis, 0), dtype=dtype)
    merged = tensors_of(tmp_path / "out")
    assert torch.equal(merged.pop("some.count"), torch.arange(3))
    assert {t.dtype for t in merged.values()} == {dtype}
    name = str(dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype
    assert (report.total.relative_error < 1e-6) == (dtype == torch.float32)


def test_without_a_dtype_each_tensor_keeps_its_own(pico_bf16: Path, tmp_path: Path) -> None:
    basis = random_basis(pico_bf16, rank=4)
    merge(pico_bf16, basis, tmp_path / "out", random_adapter(basis, 0))
    before, after = tensors_of(pico_bf16), tensors_of(tmp_path / "out")
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    assert torch.equal(after["some.odd"], torch.ones(3))


@pytest.mark.parametrize("strength", [1e-4, 3e-3, 0.3])
def test_the_share_that_survives_rounding_is_measured(
    pico_bf16: Path, tmp_path: Path, strength: float
) -> None:
    basis = random_basis(pico_bf16, rank=4, scaling=0.5)
    adapter = random_adapter(basis, 0, strength)
    report = merge(pico_bf16, basis, tmp_path / "out", adapter)
    before, after = tensors_of(pico_bf16), tensors_of(tmp_path / "out")
    overlap = square = weight = error = 0.0
    for index, target in enumerate(basis.targets):
        core = basis.core(adapter.cores, index).double()
        delta = 0.5 * basis.b(target.module).double() @ core @ basis.a(target.module).double()
        w0 = before[f"{target.module}.weight"]
        w1 = after[f"{target.module}.weight"]
        assert is_rounded_sum(w1, w0, delta)
        stored = w1.double() - w0.double()
        overlap += float((stored * delta).sum())
        square += float(delta.square().sum())
        weight += float(w0.double().square().sum())
        error += float((stored - delta).square().sum())
    assert report.total.kept == pytest.approx(overlap / square, rel=1e-4)
    assert report.total.ratio == pytest.approx((square / weight) ** 0.5, rel=1e-4)
    assert report.total.relative_error == pytest.approx((error / square) ** 0.5, rel=1e-4)
    errors = [report.modules[name].relative_error for name in report.worst_first]
    assert errors == sorted(errors, reverse=True)
    assert report.narrow == report.modules.keys()
    assert (report.total.kept < 0.9) == (strength < 0.3)


def test_stochastic_rounding_keeps_a_small_delta_and_depends_on_its_seed_alone(
    pico_bf16: Path, tmp_path: Path
) -> None:
    basis = random_basis(pico_bf16, rank=4)
    adapter = random_adapter(basis, 0, 1e-3)
    kept = {}
    for name, seed, workers in (("a", 1, 1), ("b", 1, 4), ("c", 2, 1)):
        rounding = Rounding(stochastic=True, seed=seed)
        report = merge(
            pico_bf16, basis, tmp_path / name, adapter, rounding=rounding, workers=workers
        )
        kept[name] = report.total.kept
    found = {name: tensors_of(tmp_path / name) for name in kept}
    names = [f"{target.module}.weight" for target in basis.targets]
    assert all(torch.equal(found["a"][name], found["b"][name]) for name in names)
    assert not any(torch.equal(found["a"][name], found["c"][name]) for name in names)
    assert all(share == pytest.approx(1, abs=0.15) for share in kept.values())
    assert merge(pico_bf16, basis, tmp_path / "d", adapter).total.kept < 0.5
    with safe_open(tmp_path / "a" / SINGLE, "pt") as file:
        changes = json.loads(file.metadata()["lorasb.changes"])
    assert changes == {"rounding": "stochastic", "seed": 1}
    with pytest.raises(InputError, match="rounding: found stochastic for weights written in 32"):
        wide = {"rounding": Rounding(stochastic=True), "dtype": torch.float32}
        merge(pico_bf16, basis, tmp_path / "e", adapter, **wide)


def test_of_large_weights_a_sample_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    target = TargetModule("x", 4, 64, 4096)
    basis = basis_for([target])
    delta = core_deltas(basis, random_adapter(basis, 0, 0.3).cores)(0, torch.float32)
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(4096, 64, generator=generator)).bfloat16()
    monkeypatch.setattr(fold, "BLOCK_ELEMENTS", 64 * 64)
    monkeypatch.setattr(fold, "MEASURED_WHOLE", 1 << 16)
    out = {}
    for every in (False, True):
        out[every] = fold_target(
            weight, delta, weight.dtype, lambda *_: None, target, measure_all=every
        )
    sample, whole = out[False], out[True]
    assert (whole.entries, whole.measured) == (weight.numel(), weight.numel())
    assert (sample.entries, sample.measured) == (weight.numel(), weight.numel() // 4)
    assert sample.ratio == pytest.approx(whole.ratio, rel=0.02)
    assert sample.kept == pytest.approx(whole.kept, abs=0.02)
    assert sample.relative_error == pytest.approx(whole.relative_error, rel=0.02)


def test_float64_weights_are_merged_in_float64(pico: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(pico, model)
    tensors = {name: tensor.double() for name, tensor in tensors_of(pico).items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] += 1e-12
    safetensors.torch.save_file(tensors, model / SINGLE, {"format": "pt"})
    basis = random_basis(model, rank=4)
    adapter = random_adapter(basis, 0)
    report = merge(model, basis, tmp_path / "out", adapter)
    expected = tensors[name] + exact_delta(basis, adapter, 0)
    merged = tensors_of(tmp_path / "out")[name]
    assert merged.dtype == torch.float64
    assert torch.allclose(merged, expected, rtol=0, atol=1e-14)
    assert report.total.relative_error < 1e-13


def test_a_shard_whose_tensors_are_not_aligned_is_merged_too(
    pico_bf16: Path, tmp_path: Path
) -> None:
    """Old files have headers of any length."""
    model = tmp_path / "model"
    shutil.copytree(pico_bf16, model)
    data = (model / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip(b" ")
    while (8 + len(header)) % 2 == 0:
        header += b" "
    (model / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    basis = random_basis(pico_bf16, rank=4)
    adapter = random_adapter(basis, 0)
    merge(model, basis, tmp_path / "out", adapter)
    merge(pico_bf16, basis, tmp_path / "same", adapter)
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "same")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_delta_of_zero_changes_no_bit_and_is_kept_whole(pico_bf16: Path, tmp_path: Path) -> None:
    basis = random_basis(pico_bf16, rank=2)
    report = merge(pico_bf16, basis, tmp_path / "out", random_adapter(basis, 0, 0.0))
    assert (report.total.kept, report.total.ratio, report.total.relative_error) == (1.0, 0.0, 0.0)
    before, after = tensors_of(pico_bf16), tensors_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_folding_in_blocks_of_rows_gives_the_whole(
    pico: Path, basis: Basis, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta, target = core_deltas(basis, adapter.cores)(0, torch.float32), basis.targets[0]
    weight = weight_of(load_causal_lm(pico).get_submodule(target.module))
    whole, parts = torch.empty_like(weight), torch.empty_like(weight)
    measured = fold_target(weight, delta, weight.dtype, whole.__setitem__, target)
    monkeypatch.setattr(fold, "BLOCK_ELEMENTS", 5 * weight.shape[1])
    by_parts = fold_target(weight, delta, weight.dtype, parts.__setitem__, target)
    assert torch.allclose(whole, parts, rtol=0, atol=1e-6)
    assert dataclasses.astuple(by_parts) == pytest.approx(
        dataclasses.astuple(measured), rel=1e-6, abs=1e-12
    )


def test_folding_in_memory_is_what_merging_writes(
    pico_bf16: Path, basis: Basis, tmp_path: Path
) -> None:
    basis = random_basis(pico_bf16, rank=4, scaling=0.5)
    adapter = random_adapter(basis, 0, 0.1)
    report = merge(pico_bf16, basis, tmp_path / "out", adapter)
    model = load_causal_lm(pico_bf16)
    total = fold_into_model(model, basis, scale_core(adapter.cores, basis.scaling))
    merged = load_causal_lm(tmp_path / "out").state_dict()
    assert all(torch.equal(merged[name], t) for name, t in model.state_dict().items())
    assert total == report.total


def test_folding_in_memory_checks_every_target_first(pico: Path, basis: Basis) -> None:
    model = load_causal_lm(pico)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    cores = torch.ones(basis.size)
    last = basis.targets[-1]
    for change, message in (
        ({"module": "model.nothing"}, "found no such module"),
        ({"module": "model.norm"}, "found LlamaRMSNorm, expected a linear layer"),
        ({"in_features": last.in_features + 1}, "found a weight of"),
    ):
        targets = (*basis.targets[:-1], dataclasses.replace(last, **change))
        with pytest.raises(BasisMismatchError, match=message):
            fold_into_model(model, dataclasses.replace(basis, targets=targets), cores)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_the_fingerprint_knows_weights_and_config_but_not_shards(
    pico: Path, tmp_path: Path
) -> None:
    original = fingerprint(open_checkpoint(pico))
    assert fingerprint(open_checkpoint(reshard(pico, tmp_path / "shards"))) == original
    config = json.loads((pico / "config.json").read_text())
    shutil.copytree(pico, tmp_path / "config")
    (tmp_path / "config" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert fingerprint(open_checkpoint(tmp_path / "config")) != original
    shutil.copytree(pico, tmp_path / "weights")
    tensors = tensors_of(pico)
    tensors["model.norm.weight"][0] += 1
    safetensors.torch.save_file(tensors, tmp_path / "weights" / SINGLE, {"format": "pt"})
    assert fingerprint(open_checkpoint(tmp_path / "weights")) != original
    other = make_pico_llama(tmp_path / "other", seed=1)
    assert fingerprint(open_checkpoint(other)) != original


@pytest.mark.slow
def test_the_real_model_merged_says_what_changed_weights_say(smol: Path, tmp_path: Path) -> None:
    basis = random_basis(smol, rank=8)
    adapter = random_adapter(basis, 0, 0.5)
    merge(smol, basis, tmp_path / "out", adapter, dtype=torch.float32)
    by_hand = load_causal_lm(smol, torch.float32)
    for index, target in enumerate(basis.targets):
        b, a = basis.b(target.module), basis.a(target.module)
        weight_of(by_hand.get_submodule(target.module)).add_(
            b @ basis.core(adapter.cores, index) @ a
        )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    merged, plain = load_causal_lm(tmp_path / "out"), load_causal_lm(smol, torch.float32)
    assert merged.dtype == torch.float32
    found, expected, base = (
        model.generate(**prompt, do_sample=False, max_new_tokens=24)[0].tolist()  # type: ignore[operator]
        for model in (merged, by_hand, plain)
    )
    assert found == expected
    assert found != base
