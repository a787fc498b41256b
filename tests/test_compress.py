"""`lorasb compress`: LoRAs as PEFT writes them in, a joint basis and exact errors out."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from bases import reference_logits
from conftest import Run
from foreign import (
    TOKENS,
    dense,
    lora_config,
    peft_logits,
    rewrite,
    save_latent,
    save_peft,
    set_config,
    tensors_of,
)
from loras import LoraSet, write_loras
from peft import AdaLoraConfig, PeftModel, TinyLoraConfig
from pico import make_pico
from serving import lorasb, serving

from lorasb_runtime.models.load import load_causal_lm, load_tokenizer
from lorasb_runtime.storage.adapter_file import Adapter, load_adapter
from lorasb_runtime.storage.basis_file import Basis, load_basis
from lorasb_runtime.storage.checkpoint import fingerprint, open_checkpoint

FAMILIES = LoraSet(8, rank=2, families=2, width=4, noise=0.3, size=0.02)


@pytest.fixture
def compress(command: Run) -> Run:
    """Runs `lorasb compress ...`."""
    return partial(command, "compress")


@pytest.fixture(scope="module")
def four(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """LoRAs of rank 4 by PEFT: one whole, one with other ranks, rsLoRA and one in bfloat16."""
    folder = tmp_path_factory.mktemp("loras")
    patterns: dict[str, Any] = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    stable: dict[str, Any] = {"use_rslora": True, "target_modules": ["q_proj"]}
    paths = [
        save_peft(pico, folder / "plain", lora_config(), 1),
        save_peft(pico, folder / "patterns", lora_config(**patterns), 2),
        save_peft(pico, folder / "stable", lora_config(**stable), 3),
        save_peft(pico, folder / "half", lora_config(), 4),
    ]
    rewrite(paths[3], {name: t.bfloat16() for name, t in tensors_of(paths[3]).items()})
    return paths


@pytest.fixture(scope="module")
def eight(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_loras(pico, FAMILIES, tmp_path_factory.mktemp("families"))


def read(folder: Path, name: str) -> tuple[Basis, Adapter]:
    basis = load_basis(folder / "basis.safetensors")
    return basis, load_adapter(folder / f"{name}.safetensors", basis)


def delta(basis: Basis, adapter: Adapter, module: str) -> torch.Tensor:
    index = [t.module for t in basis.targets].index(module)
    core = basis.core(adapter.cores, index).double()
    return basis.scaling * (basis.b(module).double() @ core @ basis.a(module).double())


def test_a_rank_that_holds_them_all_gives_what_peft_gives(
    compress: Run, pico: Path, four: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "joint"
    status, said, _ = compress(*four, "--rank", 16, "--model", pico, "-o", output, "--json")
    assert status == 0
    told = json.loads(said)
    assert [p.name for p in sorted(output.iterdir())] == sorted(
        ["basis.safetensors", *(f"{p.name}.safetensors" for p in four)]
    )
    for path in four:
        basis, adapter = read(output, path.name)
        assert adapter.name == path.name and basis.method == "joint" and basis.scaling == 1.0
        found = reference_logits(pico, basis, adapter, TOKENS)
        assert torch.allclose(found, peft_logits(pico, path), atol=2e-4)
    assert basis.base_model is not None
    assert basis.base_model.fingerprint == fingerprint(open_checkpoint(pico))
    ranks = {t.module: t.rank for t in basis.targets}
    assert ranks["model.layers.0.self_attn.q_proj"] == 14  # 4 + 2 + 4 + 4
    assert ranks["model.layers.1.mlp.down_proj"] == 12
    assert told["mean_error"] < 3e-7 and told["bases"][0]["ranks"] == ranks


def test_all_formats_that_are_imported_are_compressed_together(
    compress: Run, pico: Path, four: list[Path], tmp_path: Path
) -> None:
    latent = save_latent(pico, tmp_path / "latent", "lora-xs", lora_alpha=6)
    tiny = save_peft(pico, tmp_path / "tiny", TinyLoraConfig(r=2, target_modules=["q_proj"]))
    ada = AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["v_proj"])
    paths = [four[0], latent, tiny, save_peft(pico, tmp_path / "ada", ada)]
    output = tmp_path / "joint"
    status, _, errors = compress(*paths, "--rank", 16, "--model", pico, "-o", output)
    assert status == 0, errors
    for path in paths:
        basis, adapter = read(output, path.name)
        if path != latent:
            found = reference_logits(pico, basis, adapter, TOKENS)
            assert torch.allclose(found, peft_logits(pico, path), atol=2e-4)
    module = "model.layers.1.mlp.down_proj"
    basis, adapter = read(output, "latent")
    assert torch.allclose(delta(basis, adapter, module), dense(latent, module, 1.5), atol=1e-5)


def test_errors_are_those_of_the_merged_weights(
    compress: Run, eight: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "joint"
    status, said, _ = compress(*eight, "--rank", 5, "-o", output, "--json")
    assert status == 0
    told = json.loads(said)
    errors = [adapter["relative_error"] for adapter in told["adapters"]]
    assert errors == sorted(errors, reverse=True) and 0.2 < errors[0] < 1
    by_rank = list(told["bases"][0]["mean_error_by_rank"].items())
    assert [rank for rank, _ in by_rank] == ["1", "2", "5"]
    assert by_rank[0][1] > by_rank[1][1] > by_rank[2][1] == pytest.approx(told["mean_error"])
    for one in told["adapters"]:
        basis, adapter = read(output, one["name"])
        assert (one["version"], one["cluster"]) == (adapter.version, 0)
        assert adapter.info["compressed"]["relative_error"] == one["relative_error"]
        lost = whole = 0.0
        for target in basis.targets:
            wanted = dense(Path(one["source"]), target.module, 2.0)
            apart = (wanted - delta(basis, adapter, target.module)).norm().item()
            assert one["modules"][target.module] == pytest.approx(apart / wanted.norm().item())
            lost, whole = lost + apart**2, whole + wanted.norm().item() ** 2
        assert one["relative_error"] == pytest.approx((lost / whole) ** 0.5)
        assert one["worst_module"] == max(one["modules"], key=one["modules"].__getitem__)
    assert basis.base_model is not None and basis.base_model.fingerprint is None


def test_clusters_have_a_basis_each_and_lose_less(
    compress: Run, eight: list[Path], tmp_path: Path
) -> None:
    flags = ("--rank", 4, "--json", "-o")
    whole = json.loads(compress(*eight, *flags, tmp_path / "one")[1])
    told = json.loads(compress(*eight, "--clusters", 2, *flags, tmp_path / "two")[1])
    assert told["mean_error"] < 0.7 * whole["mean_error"]
    for one in told["adapters"]:
        part = tmp_path / "two" / f"cluster-{one['cluster']}"
        assert one["name"].startswith(f"family{one['cluster']}-")  # numbered by the first LoRA
        assert Path(one["file"]) == part / f"{one['name']}.safetensors"
        read(part, one["name"])  # refused unless it is for this basis
    assert [basis["loras"] for basis in told["bases"]] == [4, 4]


def test_two_runs_write_the_same_bytes_and_force_replaces_them(
    compress: Run, eight: list[Path], tmp_path: Path
) -> None:
    flags = ("--rank", 4, "--clusters", 2, "-o", tmp_path / "joint")
    assert compress(*eight, *flags)[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "joint").rglob("*.safetensors")}
    status, _, errors = compress(*eight, *flags)
    assert status == 2 and "already exists" in errors
    assert compress(*eight, *flags, "--force")[0] == 0
    assert before == {p: p.read_bytes() for p in (tmp_path / "joint").rglob("*.safetensors")}
    (tmp_path / "joint" / "cluster-0" / "notes.txt").write_text("mine")
    status, _, errors = compress(*eight, *flags, "--force")
    assert status == 2 and "notes.txt" in errors


def test_a_lora_of_zeros_and_missing_modules_are_kept_as_they_are(
    compress: Run, pico: Path, four: list[Path], tmp_path: Path
) -> None:
    zeros = save_peft(pico, tmp_path / "zeros", lora_config())
    rewrite(zeros, {n: t * ("lora_A" in n) for n, t in tensors_of(zeros).items()})
    elsewhere = save_peft(pico, tmp_path / "elsewhere", lora_config(target_modules=["o_proj"]))
    rewrite(elsewhere, {n: t * ("lora_B" in n) for n, t in tensors_of(elsewhere).items()})
    output, words = tmp_path / "joint", (four[2], zeros, elsewhere, "--rank", 8)
    told = json.loads(compress(*words, "-o", output, "--json")[1])
    basis, adapter = read(output, "zeros")
    assert not adapter.cores.any()
    assert {t.module.rpartition(".")[2] for t in basis.targets} == {"q_proj"}
    assert {a["name"]: a["relative_error"] < 1e-6 for a in told["adapters"]} == {
        "zeros": True,
        "elsewhere": True,
        "stable": True,
    }
    assert read(output, "elsewhere")[1].info["compressed"]["worst_error"] == 0
    status, _, errors = compress(zeros, "--rank", 8, "-o", tmp_path / "none")
    assert status == 2 and "found no delta but zeros" in errors


def test_the_text_shows_the_worst_first_and_what_to_make_of_it(
    compress: Run, eight: list[Path], tmp_path: Path
) -> None:
    set_config(eight[1], base_model_name_or_path="another")
    status, said, errors = compress(*eight, "--rank", 2, "-o", tmp_path / "joint")
    set_config(eight[1], base_model_name_or_path="pico")
    lines = said.splitlines()
    assert status == 0 and "name 2 base models (pico, another" in errors
    start = next(i for i, line in enumerate(lines) if line.startswith("adapter"))
    shown = [float(line.split()[1]) for line in lines[start + 1 : start + 9]]
    assert shown == sorted(shown, reverse=True)
    assert "arXiv 2407.00066" in said and "8 of 8 adapters are at 0.6 or more" in said


def test_bad_input_is_one_line_and_leaves_nothing(
    compress: Run, pico: Path, four: list[Path], eight: list[Path], tmp_path: Path
) -> None:
    other = make_pico("llama", tmp_path / "wide", hidden_size=64, intermediate_size=64)
    wide = save_peft(other, tmp_path / "wide-lora", lora_config())
    dora = save_peft(pico, tmp_path / "dora", lora_config(use_dora=True))
    again = save_peft(pico, tmp_path / "again" / "plain", lora_config())
    (tmp_path / "again" / "more").mkdir()
    for words, text in (
        ((*eight, "--rank", 3, "--max-error", 0.1), "expected at most 0.1 (--max-error)"),
        ((four[0], wide, "--rank", 4), "a basis is of one model"),
        ((four[0], "--model", other, "--rank", 4), "expected the model's"),
        ((four[0], dora, "--rank", 4), "use_dora"),
        ((four[0], again, four[0], "--rank", 4), "rename the folder"),
        ((four[0], "--rank", 4, "--clusters", 2), "expected at most 1, one for each LoRA"),
        ((four[0], "--rank", 4, "--max-error", -1), "expected 0 or more"),
        ((four[0], tmp_path / "none", "--rank", 4), "no such folder"),
        ((tmp_path / "again" / "more", "--rank", 4), "no checkpoint that is known"),
        ((four[0],), "--rank"),
        ((four[0], "--rank", 0), "greater than or equal to 1"),
    ):
        status, said, errors = compress(*words, "-o", tmp_path / "out")
        assert (status, said) == (2, ""), errors
        assert text in errors.splitlines()[-1], errors
        assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]


@pytest.mark.slow
def test_the_real_model_serves_what_was_compressed(smol: Path, tmp_path: Path) -> None:
    """The same greedy tokens as PEFT with the LoRA itself."""
    loras = write_loras(smol, LoraSet(2, rank=4, families=2, size=8e-3), tmp_path / "loras")
    joint, store = tmp_path / "joint", tmp_path / "store"
    lorasb("compress", *loras, "--rank", 8, "--model", smol, "-o", joint)
    lorasb("publish", joint, store)
    flags = ("--basis", joint / "basis.safetensors", "--adapters", store, "--dtype", "float32")
    tokens = load_tokenizer(smol)("The sea is")["input_ids"]
    body = {"prompt": tokens, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with serving(tmp_path / "log", smol, *flags) as url:
        said = set()
        for path in loras:
            request = {**body, "model": path.name}
            answer = httpx.post(f"{url}/v1/completions", json=request, timeout=60)
            text = answer.raise_for_status().json()["choices"][0]["text"]
            assert text == peft_text(smol, path, tokens)
            said.add(text)
    assert len(said) == 2


def peft_text(model: Path, lora: Path, tokens: list[int]) -> str:
    """What PEFT continues the tokens with, 8 tokens, greedily and in float32."""
    adapted = PeftModel.from_pretrained(load_causal_lm(model), lora).float()
    ids = list(tokens)
    with torch.inference_mode():
        for _ in range(8):
            ids.append(int(adapted(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    text: str = load_tokenizer(model).decode(ids[len(tokens) :])
    return text
