"""PEFT's LoRA, as PEFT, GeLoRA (ranks by pattern), Flat-LoRA and LoRA-Pro (rsLoRA) leave it."""

from lorasb_runtime.importing.beside import names_beside
from lorasb_runtime.importing.folder import CheckpointFolder
from lorasb_runtime.importing.foreign import Factors, ForeignAdapter
from lorasb_runtime.importing.lost_cores import refuse_lost_cores
from lorasb_runtime.importing.model import Model
from lorasb_runtime.importing.peft_config import PeftConfig
from lorasb_runtime.importing.peft_tensors import by_module, in_model_order
from lorasb_runtime.importing.read_factors import read_factors

NAME = "peft-lora"
# Our own exports say so in the file's metadata; their factors may be orthonormal by chance.
OWN = "lorasb.basis"


def recognises(folder: CheckpointFolder) -> bool:
    return folder.peft_config.get("peft_type") == "LORA"


def read(folder: CheckpointFolder, model: Model | None) -> ForeignAdapter:
    """B and A of each module, scaled as PEFT scales them.

    Raises FileFormatError, also for ranks that are not the config's, and InputError for what is
    not linear in the weights.
    """
    config, file = PeftConfig(folder), folder.peft_weights
    tensors = by_module(file, ("lora_A", "lora_B"), names_beside(file, model))
    modules: dict[str, Factors] = {}
    for module in in_model_order(tensors):
        names = tensors[module]
        scaling = config.scaling(module)
        factors = read_factors(file, module, names["lora_A"], names["lora_B"], scaling)
        config.check_rank(module, factors.a.shape[0])
        modules[module] = factors
    if OWN not in file.metadata:
        refuse_lost_cores(folder.source, modules, model)
    return ForeignAdapter(
        folder.source,
        NAME,
        modules,
        transposed=config.transposed_of(modules),
        base_model=config.base_model,
    )
