"""From a Hugging Face id or a local folder to a folder of safetensors on this disk."""

from pathlib import Path

from lorasb_runtime.errors import InputError, NotFoundError
from lorasb_runtime.storage.checkpoint import Checkpoint, fingerprint, open_checkpoint
from lorasb_runtime.types import BaseModelId

# Weights as safetensors only, and what config and tokenizer need.
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")


def locate_model(model: str, revision: str | None = None) -> Path:
    """The folder of MODEL; an id of the Hugging Face hub is downloaded into its cache.

    Raises NotFoundError when it is neither a folder nor an id that the hub gives out, and
    InputError for a GGUF file.
    """
    if Path(model).is_dir():
        return Path(model)
    if model.endswith(".gguf"):
        raise InputError(
            f"{model}: found a GGUF file, expected a folder of safetensors; unpack it first (in "
            "transformers: from_pretrained(folder, gguf_file=...), then save_pretrained)"
        )
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists():
        raise NotFoundError(f"{model}: no such model folder")
    # Only now, as it takes a third of a second that folders do not need.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(PATTERNS)))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NotFoundError(
            f"{model}: neither a folder here nor a model that the hub gives out ({reason})"
        ) from None


def model_name(model: str) -> str:
    """The name to show for MODEL: a folder's own name, or the hub id as it is."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def identify(model: str, checkpoint: Checkpoint) -> BaseModelId:
    """What a basis records about its base model."""
    return BaseModelId(model_name(model), None, fingerprint(checkpoint))


def open_model(model: str) -> Checkpoint:
    """Locate MODEL and read its headers."""
    return open_checkpoint(locate_model(model))
