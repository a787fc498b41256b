"""LoRA-SB and LoRA-XS training checkpoints: PEFT's LoRA with a core between A and B.

As CERT-Lab/lora-sb and MohammadrezaBanaei/LoRA-XS save them, under all spellings of the core's
name. Nothing in a checkpoint tells the two methods apart: what its bases look like is a guess.
"""

from pathlib import Path
from typing import Any

from lorasb_runtime.errors import FileFormatError
from lorasb_runtime.importing.beside import names_beside
from lorasb_runtime.importing.folder import CheckpointFolder
from lorasb_runtime.importing.foreign import Factors, ForeignAdapter
from lorasb_runtime.importing.model import Model
from lorasb_runtime.importing.orthonormality import measure
from lorasb_runtime.importing.peft_config import PeftConfig
from lorasb_runtime.importing.peft_tensors import SPELLINGS, by_module, in_model_order
from lorasb_runtime.importing.read_factors import read_factors
from lorasb_runtime.storage.json_file import read_json_object

NAME = "lora-sb-or-xs"
RECONSTRUCTION = "reconstr_config.json"  # beside the adapter or one folder up, or nowhere
STATED = ("reconstruction_type", "r_squared", "half_init_dec", "replacement_module_random_init")


def recognises(folder: CheckpointFolder) -> bool:
    if folder.peft_config.get("peft_type") != "LORA":
        return False
    names = folder.peft_weights.names
    return any(SPELLINGS["core"].search(name) for name in names)


def read(folder: CheckpointFolder, model: Model | None) -> ForeignAdapter:
    """B, core and A of each module, scaled by alpha / r (alpha / sqrt(r) with rsLoRA).

    Raises FileFormatError, and InputError for what is not linear in the weights.
    """
    config, file = PeftConfig(folder), folder.peft_weights
    tensors = by_module(file, ("lora_A", "lora_B", "core"), names_beside(file, model))
    modules: dict[str, Factors] = {}
    for module in in_model_order(tensors):
        names = tensors[module]
        core = file.tensor(names["core"], 2)
        scaling = config.scaling(module)
        factors = read_factors(file, module, names["lora_A"], names["lora_B"], scaling, core)
        config.check_rank(module, factors.a.shape[0])
        modules[module] = factors
    found = measure(modules.values())
    guess: dict[str, Any] = {"method": found.method}
    if found.method is not None:
        guess |= {"b_off_identity": found.b, "a_off_identity": found.a}
    return ForeignAdapter(
        folder.source,
        NAME,
        modules,
        shared=True,
        transposed=config.transposed_of(modules),
        base_model=config.base_model,
        info={"guess": guess, **_reconstruction(folder.path)},
    )


def _reconstruction(folder: Path) -> dict[str, Any]:
    """How the training run says that it made its bases, where it says so."""
    places = (folder, folder.resolve().parent)
    path = next((p / RECONSTRUCTION for p in places if (p / RECONSTRUCTION).is_file()), None)
    if path is None:
        return {}
    stated = read_json_object(path)
    for key in STATED:
        if not isinstance(stated.get(key, ""), str | bool) or len(str(stated.get(key, ""))) > 80:
            raise FileFormatError(str(path), f"{key} {stated[key]!r:.80}", "a word, true or false")
    return {"reconstruction": {key: stated[key] for key in STATED if key in stated}}
