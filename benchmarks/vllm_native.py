"""vLLM's own LoRA against lorasb's plugin in it, both over vLLM without LoRA.

    .venv-vllm/bin/python benchmarks/vllm_native.py models/SmolLM2-135M-Instruct

The same 32 adapters for both: as cores, and as ordinary PEFT folders (A, and scaling * B R). Each
case is a process of its own, one after the other, in `--rounds` rounds; medians are shown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm_case import cores_of

from lorasb_runtime.models.load import load_causal_lm
from lorasb_runtime.models.locate import identify
from lorasb_runtime.models.targets import find_targets
from lorasb_runtime.ops.core_matmul import scale_core
from lorasb_runtime.storage.basis_file import Basis, save_basis
from lorasb_runtime.storage.checkpoint import open_checkpoint

SPEEDS = ("decode", "overall", "prefill_seconds", "activation_seconds", "slot_bytes")


def make_basis(model: Path, rank: int) -> Basis:
    """Orthonormal noise: what it says matters no more here than what the adapters do."""
    targets = find_targets(load_causal_lm(model), rank)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for t in targets:
        a = torch.randn(t.in_features, rank, generator=generator)
        b = torch.randn(t.out_features, rank, generator=generator)
        tensors[f"{t.module}.A"] = torch.linalg.qr(a).Q.t().contiguous()
        tensors[f"{t.module}.B"] = torch.linalg.qr(b).Q.contiguous()
    return Basis(targets, tensors, "lora-sb", 1.0, identify(str(model), open_checkpoint(model)))


def write_peft(basis: Basis, number: int, folder: Path, dtype: torch.dtype) -> None:
    """An adapter as an ordinary LoRA."""
    cores = scale_core(cores_of(basis, number), basis.scaling)
    tensors = {}
    for index, t in enumerate(basis.targets):
        prefix = f"base_model.model.{t.module}"
        folded = basis.b(t.module) @ basis.core(cores, index)
        tensors[f"{prefix}.lora_A.weight"] = basis.a(t.module).to(dtype).contiguous()
        tensors[f"{prefix}.lora_B.weight"] = folded.to(dtype).contiguous()
    rank = basis.targets[0].rank
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({t.module.rpartition(".")[2] for t in basis.targets}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def run_case(case: str, options: argparse.Namespace, work: Path, **more: Any) -> dict[str, Any]:
    words = [case, options.model, work / "basis.safetensors", "--folders", work / "peft"]
    settings = {
        "rank": options.rank,
        "dtype": options.dtype,
        "batch": options.batch,
        "tokens": options.tokens,
        "repeats": options.repeats,
        **more,
    }
    for name, value in settings.items():
        words += [f"--{name}", value]
    if options.compiled and case == "base":  # with LoRA, vLLM compiles nothing on CPU
        words.append("--compiled")
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("vllm_case.py"), *map(str, words)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=None if options.verbose else subprocess.DEVNULL,
        text=True,
        check=True,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]  # and vLLM's log
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def environment() -> dict[str, str]:
    """vLLM leaves cores unused by default; here its worker has all of this process's."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    own = {name: value for name, value in os.environ.items() if not name.startswith("LORASB_")}
    return {**defaults, **own}


def rows_of(results: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    median = {
        case: {name: statistics.median(r[name] for r in runs) for name in SPEEDS}
        for case, runs in results.items()
    }
    base = median["base"]
    yield "| | decode tok/s | over base | with prefill | over base | 512 tokens s | of base |"
    yield "|---|---|---|---|---|---|---|"
    for case, m in median.items():
        yield (
            f"| {case} | {m['decode']:.0f} | {m['decode'] / base['decode']:.2f} "
            f"| {m['overall']:.0f} | {m['overall'] / base['overall']:.2f} "
            f"| {m['prefill_seconds']:.3f} | {m['prefill_seconds'] / base['prefill_seconds']:.2f} |"
        )
    yield ""
    yield "| | memory per adapter, MB | to activate one, ms |"
    yield "|---|---|---|"
    for case in ("stock", "native"):
        m = median[case]
        yield f"| {case} | {m['slot_bytes'] / 1e6:.3f} | {m['activation_seconds'] * 1e3:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rank", type=int, default=16, choices=[8, 16, 32, 64, 128])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--resident", type=int, default=10000, help="slots to fill; 0: do not")
    parser.add_argument("--compiled", action="store_true", help="the base in vLLM's default mode")
    parser.add_argument("--no-check", action="store_true", help="do not compare greedy tokens")
    parser.add_argument("--verbose", action="store_true", help="show what vLLM logs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        basis = make_basis(Path(options.model), options.rank)
        save_basis(basis, work / "basis.safetensors")
        for number in range(options.batch):
            write_peft(basis, number, work / "peft" / f"a{number}", getattr(torch, options.dtype))
        results: dict[str, list[dict[str, Any]]] = {"base": [], "stock": [], "native": []}
        for _ in range(options.rounds):
            for case, runs in results.items():
                runs.append(run_case(case, options, work, slots=options.batch))
                print(json.dumps({"case": case, **runs[-1]}), flush=True)
        if not options.no_check:
            print(json.dumps({"case": "check", **run_case("check", options, work)}), flush=True)
        if options.resident:
            found = run_case("resident", options, work, slots=options.resident)
            print(json.dumps({"case": "resident", **found}), flush=True)
    print("\n".join(rows_of(results)))


if __name__ == "__main__":
    main()
