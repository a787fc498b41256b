"""An import from beginning to end: folders in, adapters and perhaps their basis out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasb_runtime.adapters.publishing import BASIS_FILE
from lorasb_runtime.errors import InputError, TooLargeError
from lorasb_runtime.importing.folder import CheckpointFolder
from lorasb_runtime.importing.foreign import ForeignAdapter, Report
from lorasb_runtime.importing.merged import read_merged
from lorasb_runtime.importing.model import Model, check_modules, open_import_model
from lorasb_runtime.importing.output import adapter_names, check_output_folder, output_folder
from lorasb_runtime.importing.own_basis import own_basis
from lorasb_runtime.importing.readers import boosters, read_foreign
from lorasb_runtime.importing.rebase import Fit, Rebased, rebase_all
from lorasb_runtime.importing.shared_basis import OTHER_WAYS, shared_basis, shared_cores
from lorasb_runtime.storage.adapter_file import Adapter, save_adapter
from lorasb_runtime.storage.basis_file import Basis, load_basis, save_basis
from lorasb_runtime.storage.match import check_model
from lorasb_runtime.types import BaseModelId

WRITTEN = ("*.safetensors",)
MAX_ERROR = 0.5  # of a re-based adapter, where no other limit is given


@dataclass(frozen=True)
class ImportConfig:
    """What the command's flags say; None is a flag that was not given."""

    model: str | None = None
    basis: Path | None = None
    max_error: float | None = None
    from_merged: bool = False
    rank: int | None = None
    boosters: bool = False
    prefix: int | None = None

    def check(self) -> None:
        """Raise InputError for flags that do not go together."""
        if self.from_merged and self.model is None:
            raise InputError("--from-merged needs --model, the model that it was made from")
        if self.from_merged and (self.rank is None) == (self.basis is None):
            raise InputError("--from-merged needs either --rank or --basis")
        if self.rank is not None and not self.from_merged:
            raise InputError("--rank goes with --from-merged; an adapter's ranks stay as they are")
        if self.prefix is not None and not self.boosters:
            raise InputError("--prefix goes with --boosters")
        if self.boosters and self.from_merged:
            raise InputError("expected at most one of --boosters and --from-merged")
        if self.max_error is not None and not self.max_error >= 0:
            raise InputError(f"--max-error: found {self.max_error}, expected 0 or more")


@dataclass(frozen=True)
class Imported:
    """One adapter that was written. fits: by module; None where the cores were only copied."""

    source: str
    format: str
    file: Path
    adapter: Adapter
    fits: dict[str, Fit] | None
    info: dict[str, Any]

    @property
    def total(self) -> Fit | None:
        return None if self.fits is None else sum(self.fits.values(), Fit())


@dataclass(frozen=True)
class ImportResult:
    """basis_file: None where the adapters are for a basis that was given."""

    adapters: list[Imported]
    basis: Basis
    basis_file: Path | None


def import_checkpoints(
    paths: Sequence[Path],
    config: ImportConfig,
    output: Path,
    *,
    force: bool = False,
    report: Report = lambda *_: None,
) -> ImportResult:
    """Read the checkpoints and write an adapter for each into the folder `output`, all or none.

    Raises InputError for what cannot be imported, with the way out; BasisMismatchError where
    checkpoint, model and basis do not belong together; TooLargeError over the limit of the error;
    ConflictError for an output that is in the way.
    """
    config.check()
    check_output_folder(output, WRITTEN, force=force)
    names = adapter_names(paths)
    model = None if config.model is None else open_import_model(config.model)
    basis = None if config.basis is None else load_basis(config.basis)
    if basis is not None and model is not None:
        check_model(basis, model.checkpoint, str(config.basis))
    adapters = [_read(CheckpointFolder(path), config, model, report) for path in paths]
    made, cores, fits = _fit(adapters, basis, model, config, report)
    with output_folder(output, WRITTEN, force=force) as folder:
        if basis is None:
            save_basis(made, folder / BASIS_FILE)
        results = []
        for adapter, name, own, fit in zip(adapters, names, cores, fits, strict=True):
            written = _adapter(adapter, name, own, made, fit)
            file = f"{name}.safetensors"
            saved = save_adapter(written, folder / file)
            results.append(
                Imported(adapter.source, adapter.format, output / file, saved, fit, adapter.info)
            )
    return ImportResult(results, made, output / BASIS_FILE if basis is None else None)


def _read(
    folder: CheckpointFolder, config: ImportConfig, model: Model | None, report: Report
) -> ForeignAdapter:
    if config.from_merged:
        assert model is not None
        adapter = read_merged(folder, model, report)
    elif config.boosters:
        adapter = boosters.read(folder, model, config.prefix)
    else:
        adapter = read_foreign(folder, model)
    return adapter if model is None else check_modules(adapter, model)


def _fit(
    adapters: list[ForeignAdapter],
    basis: Basis | None,
    model: Model | None,
    config: ImportConfig,
    report: Report,
) -> tuple[Basis, list[torch.Tensor], list[dict[str, Fit] | None]]:
    """The basis, and for each adapter its cores and how well they fit."""
    if basis is None:
        identity = _identity(adapters, model)
        if all(adapter.shared for adapter in adapters):
            shared = shared_basis(adapters, identity, None if model is None else model.layers)
            return shared, [shared_cores(a, shared) for a in adapters], [None for _ in adapters]
        if len(adapters) > 1:
            raise InputError(
                f"found {len(adapters)} checkpoints with a basis of their own, expected one; "
                f"{OTHER_WAYS}"
            )
        basis = own_basis(adapters[0], identity, config.rank, report)
        limit = config.max_error
    else:
        limit = MAX_ERROR if config.max_error is None else config.max_error
    rebased = rebase_all(adapters, basis, report)
    for adapter, result in zip(adapters, rebased, strict=True):
        _check_error(adapter, result, basis, limit)
    return basis, [result.cores for result in rebased], [result.fits for result in rebased]


def _check_error(
    adapter: ForeignAdapter, result: Rebased, basis: Basis, limit: float | None
) -> None:
    found = result.total.relative_error
    if limit is None or found <= limit:
        return
    lost = result.fits.keys() - {target.module for target in basis.targets}
    worst = max(result.fits, key=lambda module: result.fits[module].relative_error)
    why = f"{len(lost)} of its modules are no targets, such as {min(lost)}; " if lost else ""
    raise TooLargeError(
        f"{adapter.source}: found a relative error of {found:.3g} on this basis, expected at most "
        f"{limit:g} (--max-error); {why}worst: {worst}"
    )


def _identity(adapters: Sequence[ForeignAdapter], model: Model | None) -> BaseModelId | None:
    """The given model, or else the name that a checkpoint has, which nobody has verified."""
    if model is not None:
        return model.identity
    names = (adapter.base_model for adapter in adapters if adapter.base_model is not None)
    name = next(names, None)
    return None if name is None else BaseModelId(name)


def _adapter(
    adapter: ForeignAdapter,
    name: str,
    cores: torch.Tensor,
    basis: Basis,
    fits: dict[str, Fit] | None,
) -> Adapter:
    imported: dict[str, Any] = {"format": adapter.format, **adapter.info}
    if fits is not None:
        imported["relative_error"] = sum(fits.values(), Fit()).relative_error
    return Adapter(cores, basis.digest, name, basis.base_model, {"imported": imported})
