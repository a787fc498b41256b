"""lorasb: serve, merge and train LoRA-SB adapters (W = W0 + scaling * B @ R @ A).

Importing this package loads neither torch nor vllm until one of its names is used.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Adapter": "lorasb_runtime.storage.adapter_file",
    "AdapterStore": "lorasb_runtime.adapters.store",
    "Basis": "lorasb_runtime.storage.basis_file",
    "InputError": "lorasb_runtime.errors",
    "LorasbError": "lorasb_runtime.errors",
    "load_adapter": "lorasb_runtime.storage.adapter_file",
    "load_basis": "lorasb_runtime.storage.basis_file",
    "save_adapter": "lorasb_runtime.storage.adapter_file",
    "save_basis": "lorasb_runtime.storage.basis_file",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
