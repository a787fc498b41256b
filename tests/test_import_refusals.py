"""What cannot be imported is refused by name, in one line with the way out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import PREFIX, lora_config, rewrite, save_peft, set_config, tensors_of
from imports import refused
from peft import LoKrConfig, LoraConfig, PeftConfig, PrefixTuningConfig

from lorasb_runtime.errors import FileFormatError, InputError, NotFoundError
from lorasb_runtime.importing.run import ImportConfig, import_checkpoints

Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture
def lora(pico: Path, tmp_path: Path) -> Path:
    return save_peft(pico, tmp_path / "alice", lora_config())


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
        ({"alpha_pattern": {"q_proj": None}}, "found alpha_pattern"),
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


def test_a_folder_without_a_checkpoint_says_what_is_in_it(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "found no checkpoint that is known, expected adapter_config.json")
    refused(tmp_path / "none", "no such folder", NotFoundError)
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"")
    refused(file, "found a file, expected the folder of a checkpoint", FileFormatError)
    save_peft(pico, tmp_path / "runs" / "one", LoraConfig(target_modules=["q_proj"]))
    refused(tmp_path / "runs", r"found no checkpoint but folders with one \(one\), expected")
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
