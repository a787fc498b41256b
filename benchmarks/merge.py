"""Merging against copying the same files, and against PEFT's merge_and_unload and save_pretrained.

    python benchmarks/merge.py --folder /somewhere/with/30GB

The model is made here: random bf16 weights of Llama-3.2-3B's shapes in several shards. Each run is
a process of its own, and the runs take turns; every one ends when its files are on the disk. Memory
is anonymous memory (RssAnon), sampled; mapped files do not count. PEFT merges the same adapter, as
an ordinary LoRA, into the same model with fewer layers (--peft-layers).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from checkpoint_files import Shape, make_checkpoint, make_lora

from lorasb_runtime.engines.torch.bench import machine

LORASB = (sys.executable, "-c", "from lorasb_tools.cli import main; main()")
COPY = """
import os, shutil, sys
from pathlib import Path
source, output = map(Path, sys.argv[1:])
output.mkdir()
for path in sorted(source.iterdir()):
    shutil.copyfile(path, output / path.name)
    with (output / path.name).open("rb") as file:
        os.fsync(file.fileno())
"""
PEFT = """
import os, sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
source, lora, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, lora).merge_and_unload()
model.save_pretrained(output)
for path in Path(output).iterdir():
    with path.open("rb") as file:
        os.fsync(file.fileno())
"""
START = "from lorasb_tools.cli import main; import torch, lorasb_runtime.merging.checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description="merging against copying, and against PEFT")
    parser.add_argument("--folder", type=Path, help="where the models go for a while")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--peft-layers", type=int, default=14)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, help="of lorasb merge; its own choice by default")
    parser.add_argument("--cold", action="store_true", help="read the sources from the disk")
    parser.add_argument("--small", action="store_true", help="tiny layers, to try this script")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(options, Path(folder)) | machine()
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:<48} {value}")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shape = Shape(hidden=64, inner=128, vocab=512) if options.small else Shape()
    files = make_checkpoint(folder / "model", shape, options.layers, options.rank)
    size = sum(path.stat().st_size for path in files.model.iterdir())
    output = folder / "out"
    merge = merge_command(options, files.model, files.basis, files.adapter, output)
    copy = [sys.executable, "-c", COPY, files.model, output]
    runs = {"copy": copy, "merge": merge, "start": [sys.executable, "-c", START]}
    found = rounds(runs, output, files.model, options)
    seconds = {name: statistics.median(s for s, _ in values) for name, values in found.items()}
    result: dict[str, Any] = {
        "parameters, billions": round(size / 2e9, 2),
        "GB of files": round(size / 1e9, 2),
        "copy, GB/s": round(size / seconds["copy"] / 1e9, 3),
        "merge, GB/s, its start included": round(size / seconds["merge"] / 1e9, 3),
        "seconds of start (imports)": round(seconds["start"], 2),
        "merge / copy": round(seconds["copy"] / seconds["merge"], 3),
        "merge / copy, without the start": round(
            seconds["copy"] / (seconds["merge"] - seconds["start"]), 3
        ),
        "merge, most anonymous MB": most(found["merge"]),
        "of these at the start, MB": most(found["start"]),
        "largest tensor, MB": round(shape.vocab * shape.hidden * 2 / 1e6),
    }
    shutil.rmtree(files.model)
    return result | against_peft(options, shape, folder / "small")


def against_peft(options: argparse.Namespace, shape: Shape, folder: Path) -> dict[str, Any]:
    """Both with the same model and adapter."""
    files = make_checkpoint(folder, shape, options.peft_layers, options.rank)
    lora = make_lora(files, folder.parent / "lora")
    output = folder.parent / "out"
    merge = merge_command(options, files.model, files.basis, files.adapter, output)
    runs = {"PEFT": [sys.executable, "-c", PEFT, files.model, lora, output], "merge": merge}
    found = rounds(runs, output, files.model, options)
    seconds = {name: statistics.median(s for s, _ in values) for name, values in found.items()}
    size = sum(path.stat().st_size for path in files.model.iterdir())
    return {
        "against PEFT: parameters, billions": round(size / 2e9, 2),
        "PEFT, seconds": round(seconds["PEFT"], 2),
        "merge, seconds": round(seconds["merge"], 2),
        "times faster": round(seconds["PEFT"] / seconds["merge"], 2),
        "PEFT, most anonymous MB": most(found["PEFT"]),
        "merge, most anonymous MB ": most(found["merge"]),
        "share of PEFT's memory": round(most(found["merge"]) / most(found["PEFT"]), 3),
    }


def merge_command(
    options: argparse.Namespace, model: Path, basis: Path, adapter: Path, output: Path
) -> list[object]:
    workers = ["--workers", options.workers] if options.workers else []
    return [*LORASB, "merge", model, "--basis", basis, adapter, "-o", output, "--json", *workers]


def rounds(
    runs: dict[str, list[Any]], output: Path, source: Path, options: argparse.Namespace
) -> dict[str, list[tuple[float, int]]]:
    """Seconds and most bytes of anonymous memory of each, in turn."""
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, command in runs.items():
            if options.cold:
                forget(source)
            os.sync()
            found[name].append(run(command))
            shutil.rmtree(output, ignore_errors=True)
            print(f"{name}: {found[name][-1][0]:.1f} s", file=sys.stderr)
    return found


def run(command: list[Any]) -> tuple[float, int]:
    began = time.monotonic()
    with subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        largest = 0
        while process.poll() is None:
            largest = max(largest, anonymous(process.pid))
            time.sleep(0.005)
        if process.returncode:
            raise RuntimeError(process.stderr.read().decode() if process.stderr else "")
    return time.monotonic() - began, largest


def anonymous(pid: int) -> int:
    """Bytes of the process' memory that no file stands for; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = next((line for line in status.splitlines() if line.startswith("RssAnon")), "")
    return int(found.split()[1]) * 1024 if found else 0


def forget(folder: Path) -> None:
    """Have the system drop what it holds of the folder's files."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def most(values: list[tuple[float, int]]) -> int:
    return round(max(memory for _, memory in values) / 1e6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
