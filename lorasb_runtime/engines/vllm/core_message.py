"""An adapter's cores as the text of a LoRARequest's path, the one way by which vLLM hands on data.

`add_lora` carries them to every worker, on whatever machine; each request then names the version
alone, and so does the key of its prefix cache. Knows no vllm.
"""

import base64

import torch

from lorasb_runtime.errors import EngineError

SCHEME = "lorasb:"


def version_path(version: str) -> str:
    """The path of a request for a version that the workers hold already."""
    return f"{SCHEME}{version}"


def write_message(version: str, cores: torch.Tensor) -> str:
    """The path that brings a version: its cores [D] as a slot holds them, scaled and rounded."""
    data = cores.contiguous().view(torch.uint8).numpy()
    return f"{SCHEME}{version}:{base64.b64encode(data.data).decode()}"


def version_in(path: str) -> str | None:
    """The version that a path names; None where it is none of ours."""
    return path.removeprefix(SCHEME).partition(":")[0] if path.startswith(SCHEME) else None


def parse_message(path: str, dtype: torch.dtype) -> tuple[str, torch.Tensor]:
    """The version, and its cores [D] of `dtype`.

    Raises EngineError for a path without cores: a LoRA's folder, or a version that is not held.
    """
    version = version_in(path)
    _, _, text = path.removeprefix(SCHEME).partition(":")
    if not version or not text:
        raise EngineError(
            f"found the LoRA path {path:.80}, expected an adapter's cores: with lorasb's plugin "
            "adapters come from its store, and vLLM's own LoRAs are not served"
        )
    data = bytearray(base64.b64decode(text, validate=True))
    return version, torch.frombuffer(data, dtype=dtype)
