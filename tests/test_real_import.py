"""A PEFT LoRA of the real SmolLM2-135M-Instruct: imported, merged, exported again and served."""

from pathlib import Path

import httpx
import pytest
import torch
from conftest import Run
from foreign import lora_config, peft_logits, save_peft
from serving import serving
from transformers import AutoModelForCausalLM

from lorasb_runtime.models.load import load_tokenizer

pytestmark = pytest.mark.slow

PROMPT = "The quick brown fox jumps over the lazy dog, and then"


def test_an_imported_lora_says_what_peft_says(smol: Path, command: Run, tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    config = lora_config(
        r=8, lora_alpha=1, target_modules=targets, rank_pattern={"v_proj": 3}, use_rslora=True
    )
    folder = save_peft(smol, tmp_path / "alice", config)
    basis, adapter = (tmp_path / "out" / f"{name}.safetensors" for name in ("basis", "alice"))
    made = ("--basis", basis)
    for words in (
        ("import", folder, "--model", smol, "-o", tmp_path / "out"),
        ("merge", smol, adapter, *made, "--dtype", "float32", "-o", tmp_path / "merged"),
        ("export", adapter, *made, "--model", smol, "-o", tmp_path / "again"),
        ("publish", adapter, tmp_path / "store", "alice"),
    ):
        status, _, err = command(*words)
        assert status == 0, err

    tokens = load_tokenizer(smol)(PROMPT)["input_ids"]
    expected = peft_logits(smol, folder, tokens)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    with torch.inference_mode():
        logits = merged.double()(input_ids=torch.tensor([tokens])).logits[0]
    for found in (logits, peft_logits(smol, tmp_path / "again", tokens)):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()

    flags = (*made, "--adapters", tmp_path / "store", "--dtype", "float32")
    with serving(tmp_path / "log", smol, *flags) as url:
        body = {"model": "alice", "prompt": tokens, "max_tokens": 1, "logprobs": 5}
        answer = httpx.post(f"{url}/v1/completions", json={**body, "temperature": 0}, timeout=120)
    (top,) = answer.json()["choices"][0]["logprobs"]["top_logprobs"]
    wanted = torch.log_softmax(expected[-1], dim=-1).topk(5).values
    assert sorted(top.values(), reverse=True) == pytest.approx(wanted.tolist(), abs=1e-3)
