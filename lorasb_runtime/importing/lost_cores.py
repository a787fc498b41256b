"""Tells a LoRA from a LoRA-SB or LoRA-XS checkpoint that has lost its cores.

PEFT up to 0.17 drops them where the adapter is not named "default". What is left loads as a LoRA
without a word, and means nothing.
"""

from collections.abc import Mapping

from lorasb_runtime.errors import InputError
from lorasb_runtime.importing.foreign import Factors
from lorasb_runtime.importing.model import Model
from lorasb_runtime.importing.orthonormality import measure

ALIKE = 0.05  # LoRA-XS' A is B' W0, up to the rounding of its decomposition
WAY_OUT = "save it again from the training run under the name 'default', or with PEFT 0.18 or later"


def refuse_lost_cores(source: str, modules: Mapping[str, Factors], model: Model | None) -> None:
    """Raise InputError where B and A are bases that were never trained.

    Both orthonormal: no training and no extraction of a delta gives that. B orthonormal and A's
    rows orthogonal: LoRA-XS, if A is B' W0, or else a delta that was extracted by an SVD; without
    the model nobody can tell.
    """
    first = list(modules.values())[:1]
    if measure(first).method is None:  # one that was trained is enough, and takes no time
        return
    method = measure(modules.values()).method
    if method is None:
        return
    if method == "lora-xs" and model is not None and not _is_of_weight(modules, model):
        return
    unsure = method == "lora-xs" and model is None
    raise InputError(
        f"{source}: found B and A that are both orthogonal, as of a {method} checkpoint that has "
        "lost its cores (PEFT up to 0.17 drops them under an adapter name other than 'default'); "
        + ("if it is a LoRA extracted by an SVD, pass --model to show it, else " * unsure)
        + WAY_OUT
    )


def _is_of_weight(modules: Mapping[str, Factors], model: Model) -> bool:
    """Whether A is B' W0 for the first module."""
    module, factors = next(iter(modules.items()))
    weight = model.read_weight(module)
    if weight is None:
        return True
    if model.layers[module].transposed:
        weight = weight.t()
    if list(weight.shape) != [factors.out_features, factors.in_features]:
        return True
    a = factors.a.double()
    return bool((factors.b.double().t() @ weight.double() - a).norm() < ALIKE * a.norm())
