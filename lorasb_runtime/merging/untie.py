"""An output embedding of its own for a model whose head is its input embedding."""

from dataclasses import replace
from typing import Any

from lorasb_runtime.errors import FileFormatError, InputError, NotFoundError
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.checkpoint import Checkpoint, TensorEntry
from lorasb_runtime.types import TargetModule

TIE = "tie_word_embeddings"


def find_tied_head(source: Checkpoint, basis: Basis) -> TargetModule | None:
    """The target that is an output embedding without a weight of its own, where there is one.

    An output embedding is known by its shape and by lying outside the numbered blocks. It is tied
    where the config says so (loaders then ignore a tensor of its own), or where it has no tensor.
    """
    sizes = {c.get("vocab_size") for c in _configs(source.config)}
    tied = any(c.get(TIE) is True for c in _configs(source.config))
    for target in basis.targets:
        outside = not any(part.isdecimal() for part in target.module.split("."))
        if outside and target.out_features in sizes and (tied or not _has_weight(source, target)):
            return target
    return None


def _has_weight(source: Checkpoint, target: TargetModule) -> bool:
    try:
        source.find_weight(target.module)
    except NotFoundError:
        return False
    return True


def refuse_tied_head(head: TargetModule) -> InputError:
    return InputError(
        f"{head.module}: found an output embedding tied to the input's, expected a weight of its "
        "own, as no reader of the checkpoint would see it merged; --untie gives it one"
    )


def untie(source: Checkpoint, head: TargetModule) -> Checkpoint:
    """`source` as if the head had its own tensor, which is read from the input embedding's place.

    Raises FileFormatError where no tensor or several could be the input embedding.
    """
    name = f"{head.module}.weight"
    shape = (head.out_features, head.in_features)
    found = {
        other: entry
        for other, entry in source.tensors.items()
        if entry.shape == shape
        and other != name
        and not any(part.isdecimal() for part in other.split("."))
    }
    if len(found) != 1:
        raise FileFormatError(
            str(source.folder),
            f"{', '.join(found) or 'no tensor'} of shape {list(shape)}",
            f"one input embedding to untie {head.module} from",
        )
    (embedding,) = found.values()
    _check_same(source, name, embedding)
    return replace(
        source, config=_untied(source.config), tensors={**source.tensors, name: embedding}
    )


def _check_same(source: Checkpoint, name: str, embedding: TensorEntry) -> None:
    """A tensor of the head's own, which loaders ignore, must at least be what they use instead."""
    own = source.tensors.get(name)
    if own is None:
        return
    contents = []
    for entry in (own, embedding):
        with (source.folder / entry.file).open("rb") as file:
            file.seek(entry.offset)
            contents.append(file.read(entry.nbytes))
    if contents[0] != contents[1]:
        raise FileFormatError(
            str(source.folder), f"{name} and an input embedding that differ", "them tied, equal"
        )


def _configs(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config and the text model's inside it."""
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, dict) else [config]


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    changed = {**config, TIE: False}
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = {**config["text_config"], TIE: False}
    return changed
