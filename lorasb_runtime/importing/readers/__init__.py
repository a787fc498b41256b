"""Readers of foreign checkpoints. A new format is one new file and one entry in IMPORTERS."""

from collections.abc import Callable
from dataclasses import dataclass

from lorasb_runtime.errors import FileFormatError, InputError
from lorasb_runtime.importing.folder import PEFT_CONFIG, PEFT_WEIGHTS, CheckpointFolder
from lorasb_runtime.importing.foreign import ForeignAdapter
from lorasb_runtime.importing.model import Model
from lorasb_runtime.importing.readers import adalora, latent, lora, sora, tinylora
from lorasb_runtime.storage.checkpoint import INDEX, SINGLE


@dataclass(frozen=True)
class Importer:
    """recognises: by names alone, no tensor is read. read: `model` is None without --model."""

    recognises: Callable[[CheckpointFolder], bool]
    read: Callable[[CheckpointFolder, Model | None], ForeignAdapter]


# The first that recognises a folder reads it.
IMPORTERS: dict[str, Importer] = {
    latent.NAME: Importer(latent.recognises, latent.read),
    lora.NAME: Importer(lora.recognises, lora.read),
    adalora.NAME: Importer(adalora.recognises, adalora.read),
    tinylora.NAME: Importer(tinylora.recognises, tinylora.read),
    sora.NAME: Importer(sora.recognises, sora.read),
}
# PEFT types whose delta PEFT itself can write as a LoRA (`save_as_lora`, 0.19 and later).
CONVERTIBLE = (
    *("C3A", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "LOHA", "LOKR", "MISS", "PSOFT"),
    *("RANDLORA", "SHIRA", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
)


def find_importer(folder: CheckpointFolder) -> Importer:
    """The reader for this folder. Raises InputError for what no reader knows, with the way out."""
    for importer in IMPORTERS.values():
        if importer.recognises(folder):
            return importer
    raise _unknown(folder)


def read_foreign(folder: CheckpointFolder, model: Model | None = None) -> ForeignAdapter:
    """What the checkpoint holds. Raises InputError, FileFormatError, NotFoundError."""
    return find_importer(folder).read(folder, model)


def _unknown(folder: CheckpointFolder) -> InputError:
    if folder.has(PEFT_CONFIG):
        kind = folder.peft_config.get("peft_type")
        way_out = "merge it into its base model and import that with --from-merged"
        if kind in CONVERTIBLE:
            way_out = "make a LoRA of it with PEFT's save_as_lora"
        return InputError(
            f"{folder.path / PEFT_CONFIG}: found peft_type {kind!r:.40}, expected LORA, ADALORA "
            f"or TINYLORA; {way_out}"
        )
    inside = sorted(p.name for p in folder.path.iterdir() if (p / PEFT_CONFIG).exists())
    if inside:
        return InputError(
            f"{folder.source}: found no checkpoint but folders with one ({', '.join(inside[:3])}), "
            "expected one; name those, or pass --boosters where they are the steps of one"
        )
    if folder.has("config.json"):
        if not any(folder.has(name) for name in (SINGLE, INDEX)):
            folder.refuse_pickles(SINGLE)
        return InputError(
            f"{folder.source}: found a whole model, expected an adapter; pass --from-merged and "
            "--model with the model that it was made from"
        )
    folder.refuse_pickles(PEFT_WEIGHTS)
    return FileFormatError(folder.source, "no checkpoint that is known", f"{PEFT_CONFIG} in it")
