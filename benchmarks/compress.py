"""`lorasb compress` on many synthetic LoRAs of a model: time, memory and errors; then it serves.

    python benchmarks/compress.py models/SmolLM2-135M-Instruct --loras 500 --rank 48

The LoRAs (families and noise, see loras.py) are written to --folder, 9.8 MB each for rank 16, and
removed at the end; --keep keeps them and the result.
"""

import argparse
import contextlib
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from loras import LoraSet, write_loras
from server_process import LORASB, serving

from lorasb_runtime.adapters.publishing import publish_folder
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.engines.torch.bench import machine

PROMPT = "The sea is"


def main() -> None:
    parser = argparse.ArgumentParser(description="joint compression of LoRAs")
    parser.add_argument("model", type=Path)
    parser.add_argument("--loras", type=int, default=500)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--families", type=int, default=4)
    parser.add_argument("--noise", type=float, default=0.2)
    parser.add_argument("--rank", type=int, default=48, help="of the joint basis")
    parser.add_argument("--clusters", type=int, default=1)
    parser.add_argument("--requests", type=int, default=5, help="adapters that are served")
    parser.add_argument("--folder", type=Path, help="where the files go for a while")
    parser.add_argument("--keep", type=Path, help="put them here and leave them")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.keep
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        for key, value in (measure(options, folder) | machine()).items():
            print(f"{key:<44} {value}")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    loras = LoraSet(options.loras, options.lora_rank, options.families, noise=options.noise)
    began = time.monotonic()
    paths = write_loras(options.model, loras, folder / "loras")
    result: dict[str, Any] = {
        "LoRAs": len(paths),
        "their files, GB": round(_nbytes(folder / "loras") / 1e9, 2),
        "seconds to write them": round(time.monotonic() - began, 1),
    }
    words = ["compress", *paths, "--rank", options.rank, "--clusters", options.clusters]
    words += ["--model", options.model, "-o", folder / "joint", "--json"]
    told, seconds, memory = run([str(word) for word in words], folder / "told.json")
    errors = [adapter["relative_error"] for adapter in told["adapters"]]
    result |= {
        "seconds to compress": round(seconds, 1),
        "own memory at most, MiB": memory // 1024,
        "result, GB": round(_nbytes(folder / "joint") / 1e9, 2),
        "relative error, mean and worst": f"{told['mean_error']:.3f} {max(errors):.3f}",
    }
    for basis in told["bases"]:
        result[f"{Path(basis['file']).parent.name}: LoRAs"] = basis["loras"]
    return result | serve(options, told, folder)


def run(words: list[str], told: Path) -> tuple[dict[str, Any], float, int]:
    """Its JSON, seconds, and the most KiB of memory that were its own (mapped files are not)."""
    began, most = time.monotonic(), 0
    with told.open("w") as file, subprocess.Popen([*LORASB, *words], stdout=file) as process:
        while process.poll() is None:
            most = max(most, _own_memory(process.pid))
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(told.read_text()), time.monotonic() - began, most


def _own_memory(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
    return 0


def serve(options: argparse.Namespace, told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Publish the first basis' adapters and ask some of them, and the model without one."""
    store = AdapterStore(str(folder / "store"))
    publish_folder(Path(told["bases"][0]["file"]).parent, store, None)
    members = [adapter for adapter in told["adapters"] if adapter["cluster"] == 0]
    flags = ["--basis", told["bases"][0]["file"], "--adapters", store.url]
    result: dict[str, Any] = {"published": len(members)}
    with serving(folder / "log", options.model, *flags) as url:
        for name in (options.model.name, *(a["name"] for a in members[: options.requests])):
            body = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            result[name] = repr(answer.raise_for_status().json()["choices"][0]["text"])
    return result


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
