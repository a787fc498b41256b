"""`peft`: an ordinary LoRA folder with the core folded into B, for PEFT, vLLM and llama.cpp."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lorasb_runtime.importing.exporters.export import Export
from lorasb_runtime.importing.folder import PEFT_CONFIG, PEFT_WEIGHTS
from lorasb_runtime.importing.output import output_folder
from lorasb_runtime.importing.peft_tensors import PREFIX
from lorasb_runtime.types import TargetModule

# What vLLM 0.32 takes as --max-lora-rank (vllm.config.lora.MaxLoRARanks).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def write(export: Export, output: Path, force: bool) -> dict[str, Any]:
    """lora_B = scaling * B R, lora_A = A, alpha = rank, so that every reader scales by 1.

    All modules have the largest rank, the others filled up with zeros: llama.cpp divides one
    alpha by each tensor's own rank and knows no rank_pattern. With `keep_ranks` they keep their
    own, with rank_pattern and alpha_pattern, for PEFT and vLLM alone.
    """
    largest = max(target.rank for target in export.basis.targets)
    shapes: dict[str, tuple[int, ...]] = {}
    for target in export.basis.targets:
        rank = target.rank if export.keep_ranks else largest
        shapes[f"{PREFIX}{target.module}.lora_A.weight"] = (rank, target.in_features)
        shapes[f"{PREFIX}{target.module}.lora_B.weight"] = (target.out_features, rank)
    with output_folder(output, (PEFT_CONFIG, PEFT_WEIGHTS), force=force) as folder:
        with (folder / PEFT_WEIGHTS).open("wb") as file:
            export.write_tensors(file, shapes, _tensors(export, largest))
        config = json.dumps(_config(export, largest), indent=2, sort_keys=True) + "\n"
        (folder / PEFT_CONFIG).write_text(config, encoding="utf-8")
    fitting = [rank for rank in VLLM_RANKS if rank >= largest]
    return {
        "rank": largest,
        "vllm_max_lora_rank": fitting[0] if fitting else None,
        "padded": sum(t.rank < largest for t in export.basis.targets if not export.keep_ranks),
    }


def _tensors(export: Export, largest: int) -> Iterator[torch.Tensor]:
    for index, target in enumerate(export.basis.targets):
        missing = 0 if export.keep_ranks else largest - target.rank
        a = export.basis.a(target.module).double()
        b = export.basis.b(target.module).double() @ export.scaled_core(index)
        yield torch.nn.functional.pad(a, (0, 0, 0, missing))
        yield torch.nn.functional.pad(b, (0, missing))


def _config(export: Export, largest: int) -> dict[str, Any]:
    """The fields that PEFT, vLLM and llama.cpp's converter read; the rest are PEFT's defaults."""
    targets = export.basis.targets
    own = {_pattern(t): t.rank for t in targets if export.keep_ranks and t.rank != largest}
    return {
        "alpha_pattern": own,
        "base_model_name_or_path": export.base_model,
        "bias": "none",
        "fan_in_fan_out": any(t.transposed for t in targets),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": largest,
        "rank_pattern": own,
        "target_modules": [t.module for t in targets],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _pattern(target: TargetModule) -> str:
    """PEFT reads the keys as regular expressions, matched at the end of the module's name."""
    return target.module.replace(".", r"\.")
