"""PEFT's AdaLoRA: B diag(E) A, with what the training pruned already gone from the tensors."""

from lorasb_runtime.errors import FileFormatError
from lorasb_runtime.importing.beside import names_beside
from lorasb_runtime.importing.folder import CheckpointFolder, TensorFile
from lorasb_runtime.importing.foreign import Factors, ForeignAdapter
from lorasb_runtime.importing.model import Model
from lorasb_runtime.importing.peft_config import PeftConfig
from lorasb_runtime.importing.peft_tensors import by_module, in_model_order
from lorasb_runtime.importing.read_factors import read_factors

NAME = "peft-adalora"
EPSILON = 1e-5  # PEFT adds it to the rank that it divides by


def recognises(folder: CheckpointFolder) -> bool:
    return folder.peft_config.get("peft_type") == "ADALORA"


def read(folder: CheckpointFolder, model: Model | None) -> ForeignAdapter:
    """Each module's core is the diagonal E; modules that were pruned to rank 0 are left out.

    The scaling is alpha / (init_r + 1e-5) also after pruning, and init_r for an alpha of 0 or
    less, as in PEFT's layer. Raises FileFormatError, and InputError for what is not linear in the
    weights.
    """
    config, file = PeftConfig(folder), folder.peft_weights
    initial = config.count("init_r", 12)
    alpha = config.number("lora_alpha", 8)
    scaling = (alpha if alpha > 0 else initial) / (initial + EPSILON)
    ranks = _ranks(config, initial)
    tensors = by_module(file, ("ada_A", "ada_B", "ada_E"), names_beside(file, model))
    unknown = sorted(ranks.keys() - tensors.keys())
    if unknown:
        raise FileFormatError(config.source, f"rank_pattern {unknown[0]!r}", "modules of the file")
    modules: dict[str, Factors] = {}
    pruned = []
    for module in in_model_order(tensors):
        names = tensors[module]
        if _is_pruned(file, names):
            found = 0
            pruned.append(module)
        else:
            diagonal = file.tensor(names["ada_E"], 2)
            if diagonal.shape[1] != 1:
                raise file.wrong(f"{names['ada_E']} of shape {list(diagonal.shape)}", "[r, 1]")
            parts = (names["ada_A"], names["ada_B"])
            modules[module] = read_factors(file, module, *parts, scaling, diagonal[:, 0])
            found = diagonal.shape[0]
        expected = ranks.get(module, initial)
        if found != expected:
            raise FileFormatError(
                config.source, f"rank {expected} for {module}", f"{found} as its tensors have"
            )
    if not modules:
        raise file.wrong("every module pruned to rank 0", "one module that does something")
    return ForeignAdapter(
        folder.source,
        NAME,
        modules,
        transposed=config.transposed_of(modules),
        base_model=config.base_model,
        info={"pruned": pruned} if pruned else {},
    )


def _is_pruned(file: TensorFile, names: dict[str, str]) -> bool:
    """Whether each of the three tensors is empty on the side of the rank."""
    sides = (("ada_A", 0), ("ada_B", 1), ("ada_E", 0))
    shapes = {kind: file.shape(names[kind]) for kind, _ in sides}
    return all(len(shapes[kind]) == 2 and shapes[kind][side] == 0 for kind, side in sides)


def _ranks(config: PeftConfig, initial: int) -> dict[str, int]:
    """How many directions of each module survived, by the pattern of booleans that PEFT saves."""
    ranks = {}
    for key, kept in config.table("rank_pattern").items():
        plain = isinstance(kept, list) and all(isinstance(one, bool) for one in kept)
        if not plain or len(kept) != initial:
            raise FileFormatError(
                config.source,
                f"rank_pattern {key[:80]!r} of another kind",
                f"a list of {initial} booleans (init_r)",
            )
        ranks[key.removesuffix(".default").removesuffix(".lora_E")] = sum(kept)
    return ranks
