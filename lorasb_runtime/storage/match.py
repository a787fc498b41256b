"""Whether a basis belongs to a checkpoint: by fingerprint, and by the shapes of its targets."""

from lorasb_runtime.errors import BasisMismatchError
from lorasb_runtime.storage.basis_file import Basis
from lorasb_runtime.storage.checkpoint import Checkpoint, fingerprint


def check_model(basis: Basis, checkpoint: Checkpoint, source: str) -> None:
    """Raise BasisMismatchError unless `basis` was made for this checkpoint.

    A basis with a null fingerprint (an import without a model) passes on its shapes alone.
    """
    check_fingerprint(basis, checkpoint, source)
    check_shapes(basis, checkpoint, source)


def check_fingerprint(basis: Basis, checkpoint: Checkpoint, source: str) -> None:
    """Raise BasisMismatchError where `basis` names a model by its fingerprint, and not this one."""
    wanted = basis.base_model.fingerprint if basis.base_model else None
    if wanted is not None:
        found = fingerprint(checkpoint)
        if found != wanted:
            raise BasisMismatchError(
                f"{source}: found a basis for the model {wanted} ({_name(basis)}), "
                f"expected one for {checkpoint.folder} ({found})"
            )


def check_shapes(basis: Basis, checkpoint: Checkpoint, source: str) -> None:
    """Raise BasisMismatchError for a target of another shape, NotFoundError for one not there."""
    for target in basis.targets:
        shape = checkpoint.weight_entry(target.module).shape
        expected = (target.out_features, target.in_features)
        if target.transposed:
            expected = (target.in_features, target.out_features)
        if shape != expected:
            raise BasisMismatchError(
                f"{source}: found {target.module} of shape {list(expected)}, "
                f"expected the model's {list(shape)}"
            )


def _name(basis: Basis) -> str:
    return basis.base_model.name if basis.base_model else "unnamed"
