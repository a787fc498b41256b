"""How checkpoints lay out their weights: fused, stacked, tied, the head itself, quantized."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from bases import basis_for, random_adapter, random_basis, reference_logits
from merging import deltas_of, exact_delta, is_rounded_sum, merge, tensors_of
from pico import make_pico
from torch import nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lorasb_runtime.errors import FileFormatError, InputError
from lorasb_runtime.merging.checkpoint import MergeConfig
from lorasb_runtime.merging.quantized import Mxfp4Rows
from lorasb_runtime.merging.verify import Verification, Verifier
from lorasb_runtime.models.load import load_causal_lm
from lorasb_runtime.storage.adapter_file import Adapter
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.checkpoint import INDEX, SINGLE, open_checkpoint
from lorasb_runtime.types import TargetModule

TOKENS = [5, 90, 17, 200, 33, 41, 7, 64]
Q0 = "model.layers.0.self_attn.q_proj"


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-5 * expected.abs().max())


def logits(folder: Path) -> torch.Tensor:
    return reference_logits(folder, random_basis(folder, 1), None, TOKENS)


def verify(
    model: Path, basis: Basis, adapter: Adapter, output: Path, **options: Any
) -> Verification:
    verifier = Verifier(
        open_checkpoint(model),
        basis,
        deltas_of(basis, adapter),
        MergeConfig(**options),
        ["Hello", "abc"],
    )
    verifier(output)
    assert verifier.result is not None
    return verifier.result


@pytest.mark.parametrize("kind", ["phi3", "gemma3", "opt", "qwen3_moe"])
def test_targets_are_named_as_the_checkpoint_names_them(kind: str, tmp_path: Path) -> None:
    """Phi-3 fuses projections, Gemma ties embeddings."""
    model = make_pico(kind, tmp_path / kind)
    basis = random_basis(model, rank=4, scaling=0.5)
    adapter = random_adapter(basis, 0)
    merge(model, basis, tmp_path / "out", adapter)
    assert close(logits(tmp_path / "out"), reference_logits(model, basis, adapter, TOKENS))


MIXTRAL = "model.layers.1.block_sparse_moe.experts"
EXPERTS: dict[str, tuple[str, list[TargetModule]]] = {
    "one by one": (
        "mixtral",
        [
            TargetModule(f"{MIXTRAL}.0.w1", 4, 32, 64),
            TargetModule(f"{MIXTRAL}.3.w2", 3, 64, 32),
            TargetModule(Q0, 4, 32, 32),
        ],
    ),
    "stacked": (
        "gpt_oss",
        [
            TargetModule("model.layers.0.mlp.experts.3.gate_up_proj", 4, 32, 128, True),
            TargetModule("model.layers.0.mlp.experts.1.gate_up_proj", 2, 32, 128, True),
            TargetModule("model.layers.1.mlp.experts.0.down_proj", 4, 64, 32, True),
        ],
    ),
    "stacked, of Llama 4": (
        "llama4",
        [
            TargetModule(f"model.layers.0.feed_forward.experts.{i}.down_proj", 2, 64, 32, True)
            for i in range(15)
        ],
    ),
}


@pytest.mark.parametrize(
    ("layout", "dtype"), [*((layout, None) for layout in EXPERTS), ("stacked", torch.bfloat16)]
)
def test_experts_are_merged_each_by_its_number(
    layout: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    kind, targets = EXPERTS[layout]
    model = make_pico(kind, tmp_path / kind)
    basis = basis_for(targets, scaling=0.5)
    adapter = random_adapter(basis, 0)
    merge(model, basis, tmp_path / "out", adapter, dtype=dtype)
    expected = {name: tensor.double() for name, tensor in tensors_of(model).items()}
    for index, target in enumerate(targets):
        head, _, rest = target.module.rpartition(".experts.")
        number, _, leaf = rest.partition(".")
        delta = exact_delta(basis, adapter, index)
        if f"{target.module}.weight" in expected:
            expected[f"{target.module}.weight"] += delta
        else:
            expected[f"{head}.experts.{leaf}"][int(number)] += delta.t()
    merged = tensors_of(tmp_path / "out")
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == (dtype or torch.float32)
        tolerance = 1e-6 if dtype is None else 2**-8
        assert torch.allclose(tensor.double(), expected[name], rtol=tolerance, atol=1e-6), name
    if dtype is None:
        found = verify(model, basis, adapter, tmp_path / "out")
        assert found.effect > 1000 * found.difference


def test_an_expert_that_is_not_there_is_refused(tmp_path: Path) -> None:
    model = make_pico("gpt_oss", tmp_path / "model")
    for module in ("experts.4.gate_up_proj", "experts.gate_up_proj", "experts.1.up_proj"):
        target = TargetModule(f"model.layers.0.mlp.{module}", 4, 32, 128, True)
        basis = basis_for([target])
        with pytest.raises(InputError, match=f"{module}|of shape"):
            merge(model, basis, tmp_path / "out", random_adapter(basis, 0))
    assert not (tmp_path / "out").exists()


def test_an_output_embedding_of_its_own_is_a_target_like_others(pico: Path, tmp_path: Path) -> None:
    basis = random_basis(pico, rank=4, pattern="lm_head|q_proj")
    assert any(target.module == "lm_head" for target in basis.targets)
    adapter = random_adapter(basis, 0)
    merge(pico, basis, tmp_path / "out", adapter)
    assert close(logits(tmp_path / "out"), reference_logits(pico, basis, adapter, TOKENS))


HEAD = TargetModule("lm_head", 4, 32, 259)


def tied(kind: str, folder: Path) -> Path:
    return make_pico(kind, folder, tie_word_embeddings=True)


def logits_with_head(model: Path, delta: torch.Tensor) -> torch.Tensor:
    """The float64 logits of a tied model whose head alone is changed."""
    loaded: Any = load_causal_lm(model, torch.float64, attention="eager")
    head = loaded.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach() + delta)
    with torch.inference_mode():
        found: torch.Tensor = loaded(input_ids=torch.tensor([TOKENS])).logits[0]
    return found


@pytest.mark.parametrize(("kind", "sharded"), [("llama", True), ("gemma3", False), ("gpt2", False)])
def test_a_tied_head_is_untied_where_it_is_asked_for(
    kind: str, sharded: bool, tmp_path: Path
) -> None:
    model = tied(kind, tmp_path / "model")
    if sharded:
        (model / SINGLE).unlink()
        load_causal_lm(tied(kind, tmp_path / "again")).save_pretrained(model, max_shard_size="20KB")
    basis = basis_for([HEAD], scaling=0.5)
    adapter = random_adapter(basis, 0)
    with pytest.raises(InputError, match="lm_head: found an output embedding tied to the input's"):
        merge(model, basis, tmp_path / "out", adapter)
    merge(model, basis, tmp_path / "out", adapter, untie=True)
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    delta = exact_delta(basis, adapter, 0)
    (embedding,) = (n for n, t in before.items() if t.shape == (259, 32))
    assert after.keys() - before.keys() == {"lm_head.weight"}
    assert torch.equal(after[embedding], before[embedding])
    assert close(after["lm_head.weight"].double(), before[embedding].double() + delta)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    assert close(logits(tmp_path / "out"), logits_with_head(model, delta))
    assert verify(model, basis, adapter, tmp_path / "out", untie=True).agreeing > 0
    if sharded:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["weight_map"]["lm_head.weight"] == index["weight_map"][embedding]
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())


def test_untying_in_vain_or_from_two_different_weights_is_refused(
    pico: Path, tmp_path: Path
) -> None:
    basis = random_basis(pico, rank=4)
    with pytest.raises(InputError, match="--untie: found no target on a tied output embedding"):
        merge(pico, basis, tmp_path / "out", random_adapter(basis, 0), untie=True)
    shutil.copytree(pico, tmp_path / "model")
    config = json.loads((pico / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**config, "tie_word_embeddings": True})
    )
    head = basis_for([HEAD])
    with pytest.raises(FileFormatError, match="an input embedding that differ"):
        merge(tmp_path / "model", head, tmp_path / "out", random_adapter(head, 0), untie=True)


def quantize(model: Path, config: dict[str, Any], change: Callable[..., Any]) -> None:
    """Every linear layer's weight replaced by what `change` makes of it, by name."""
    tensors = tensors_of(model)
    for name in [n for n in tensors if "_proj.weight" in n]:
        tensors.update(change(name, tensors.pop(name)))
    safetensors.torch.save_file(tensors, model / SINGLE, {"format": "pt"})
    said = json.loads((model / "config.json").read_text())
    said |= {"dtype": "bfloat16", "quantization_config": config}
    (model / "config.json").write_text(json.dumps(said))


def fp8_blocks(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Blocks of 16 x 16, each scaled to fill float8's range."""
    rows, columns = weight.shape
    blocks = weight.view(rows // 16, 16, columns // 16, 16)
    scales = blocks.abs().amax(dim=(1, 3)) / 448
    packed = (blocks / scales[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
    return {name: packed, f"{name}_scale_inv": scales}


def int8_rows(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scales = (weight.abs().amax(dim=1, keepdim=True) / 127).bfloat16()
    packed = (weight / scales.float()).round().clamp(-127, 127).to(torch.int8)
    return {name: packed, f"{name}_scale": scales, f"{name[:-6]}input_scale": torch.ones(1)}


def one_fp8_scale(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().max() / 448
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "int-quantized"}


@pytest.mark.parametrize(
    ("config", "change", "scale"),
    [
        (FP8, fp8_blocks, "_scale_inv"),
        (COMPRESSED, int8_rows, "_scale"),
        ({"quant_method": "fp8"}, one_fp8_scale, "_scale"),
    ],
)
def test_a_quantized_model_is_unpacked_where_it_is_asked_for(
    config: dict[str, Any], change: Callable[..., Any], scale: str, pico: Path, tmp_path: Path
) -> None:
    shutil.copytree(pico, tmp_path / "model")
    quantize(tmp_path / "model", config, change)
    model = tmp_path / "model"
    basis = basis_for(random_basis(pico, rank=4, pattern="q_proj|up_proj").targets)
    adapter = random_adapter(basis, 0)
    with pytest.raises(InputError, match=r"found a quantized checkpoint.*pass --dequantize"):
        merge(model, basis, tmp_path / "out", adapter)
    merge(model, basis, tmp_path / "out", adapter, dequantize=True, dtype=torch.float32)
    merge(model, basis, tmp_path / "bf16", adapter, dequantize=True)
    packed, merged = tensors_of(model), tensors_of(tmp_path / "out")
    assert merged.keys() == tensors_of(pico).keys()
    deltas = {f"{t.module}.weight": i for i, t in enumerate(basis.targets)}
    for name, tensor in merged.items():
        expected = packed[name].double()
        if name + scale in packed:
            scales = packed[name + scale].double()
            if scales.dim() == 2 and scales.shape[1] > 1:
                scales = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)
            expected = expected * scales
        if name in deltas:
            expected = expected + exact_delta(basis, adapter, deltas[name])
        assert torch.allclose(tensor.double(), expected, rtol=1e-6, atol=1e-7), name
    written = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in written
    projections = {t.dtype for n, t in tensors_of(tmp_path / "bf16").items() if "_proj" in n}
    assert projections == {torch.bfloat16}
    load_causal_lm(tmp_path / "bf16")
    assert (
        verify(
            model, basis, adapter, tmp_path / "out", dequantize=True, dtype=torch.float32
        ).difference
        < 1e-4
    )


def test_fp8_is_unpacked_as_transformers_does(pico: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(pico, model)
    quantize(model, FP8, fp8_blocks)
    basis = basis_for(random_basis(pico, rank=4, pattern="0.*q_proj").targets)
    merge(model, basis, tmp_path / "out", random_adapter(basis, 0, 0.0), dequantize=True)
    unpacking = FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))
    theirs = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=unpacking, dtype=torch.bfloat16
    ).state_dict()
    ours = tensors_of(tmp_path / "out")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "_proj" in name)


def test_mxfp4_is_unpacked_as_transformers_does() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 5, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 140, (3, 8, 5), dtype=torch.uint8, generator=generator)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    for expert in range(3):
        rows = Mxfp4Rows(blocks[expert], scales[expert])
        assert rows.shape == (160, 8)
        for part in (slice(0, 160), slice(7, 65), slice(32, 64), slice(159, 160)):
            assert torch.equal(rows[part], theirs[expert][part])


def test_mxfp4_experts_take_deltas(tmp_path: Path) -> None:
    """As gpt-oss comes: packed experts, [out, in / 32, 16], beside plain weights."""
    model = make_pico("gpt_oss", tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(model).items()}
    unpacked = {}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = tensors.pop(name).shape
        blocks = torch.randint(
            0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8, generator=generator
        )
        scales = torch.full((experts, outer, inner // 32), 124, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        unpacked[name] = convert_moe_packed_tensors(blocks, scales)
    safetensors.torch.save_file(tensors, model / SINGLE, {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (model / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    basis = basis_for([TargetModule("model.layers.0.mlp.experts.2.gate_up_proj", 4, 32, 128, True)])
    adapter = random_adapter(basis, 0)
    merge(model, basis, tmp_path / "out", adapter, dequantize=True)
    merged = tensors_of(tmp_path / "out")
    delta = torch.zeros(unpacked[name].shape, dtype=torch.float64)
    delta[2] = exact_delta(basis, adapter, 0).t()
    assert is_rounded_sum(merged[name], unpacked[name], delta)
    assert all(torch.equal(merged[n], t) for n, t in unpacked.items() if n != name)
    load_causal_lm(tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "found quantization method 'gptq', expected one of fp8"),
        ({"quant_method": ["fp8"]}, "found quantization method"),
        ("fp8", "found quantization method None"),
        ({"quant_method": "mxfp4"}, "found no quantized tensors"),
        ({"quant_method": "fp8"}, "found scales of shape"),
        ({**FP8, "weight_block_size": [0, 16]}, "found scales of shape"),
        (None, "found plain weights, expected quantized ones to unpack"),
    ],
)
def test_what_cannot_be_unpacked_is_refused_with_the_way_out(
    config: Any, message: str, pico: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(pico, model)
    quantize(model, config, fp8_blocks)
    basis = basis_for(random_basis(pico, rank=4).targets)
    with pytest.raises(InputError) as error:
        merge(model, basis, tmp_path / "out", random_adapter(basis, 0), dequantize=True)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()
