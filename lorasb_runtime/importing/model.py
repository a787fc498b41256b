"""The model that an import is for: who it is, and which of its layers can carry a delta."""

import dataclasses
from dataclasses import dataclass

import torch

from lorasb_runtime.errors import BasisMismatchError, NotFoundError
from lorasb_runtime.importing.folder import TensorFile
from lorasb_runtime.importing.foreign import Delta, ForeignAdapter
from lorasb_runtime.models.locate import identify, open_model
from lorasb_runtime.models.skeleton import LinearLayer, linear_layers
from lorasb_runtime.storage.checkpoint import Checkpoint
from lorasb_runtime.types import BaseModelId


@dataclass(frozen=True)
class Model:
    """layers: in the model's own order."""

    checkpoint: Checkpoint
    identity: BaseModelId
    layers: dict[str, LinearLayer]

    def tensor_name(self, module: str) -> str | None:
        """The tensor with the layer's weight; None for no layer, or one that has none there."""
        layer = self.layers.get(module)
        try:
            return None if layer is None else self.checkpoint.weight_name(layer.holder)
        except NotFoundError:
            return None

    def read_weight(self, module: str) -> torch.Tensor | None:
        """The layer's weight as the checkpoint stores it, or None as above."""
        name = self.tensor_name(module)
        if name is None:
            return None
        return TensorFile(self.checkpoint.folder / self.checkpoint.tensors[name].file).tensor(
            name, 2
        )


def open_import_model(model: str) -> Model:
    """Locate MODEL and read its configuration and headers, no weights but the fingerprint's.

    Raises NotFoundError, InputError.
    """
    checkpoint = open_model(model)
    return Model(checkpoint, identify(model, checkpoint), linear_layers(checkpoint.folder))


def check_modules(adapter: ForeignAdapter, model: Model) -> ForeignAdapter:
    """The adapter with its modules in the model's order, and with what the model transposes.

    Raises BasisMismatchError where a module is none of the model's linear layers or of another
    shape.
    """
    for name, delta in adapter.modules.items():
        layer = model.layers.get(name)
        if layer is None:
            raise BasisMismatchError(
                f"{adapter.source}: found a delta for {name}, which is no linear layer of "
                f"{model.identity.name}, such as {next(iter(model.layers), 'none')}"
            )
        found, expected = _shape(delta), _shape(layer)
        if found != expected:
            raise BasisMismatchError(
                f"{adapter.source}: found {name} of shape {found}, expected the model's {expected}"
            )
    ordered = {name: adapter.modules[name] for name in model.layers if name in adapter.modules}
    transposed = frozenset(name for name in ordered if model.layers[name].transposed)
    return dataclasses.replace(adapter, modules=ordered, transposed=transposed)


def _shape(part: Delta | LinearLayer) -> list[int]:
    return [part.out_features, part.in_features]
