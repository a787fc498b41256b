"""`lorasb import`: checkpoints of other programs become adapters."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorasb_tools.report import JSON_FLAG, emit, note, phases

if TYPE_CHECKING:
    from lorasb_runtime.importing.rebase import Fit
    from lorasb_runtime.importing.run import Imported, ImportResult

WORST = 3  # modules that are shown to people; --json has all


def import_(
    paths: list[Path] = typer.Argument(help="Checkpoint folders, one or several."),
    output: Path = typer.Option(..., "-o", "--output", help="The folder to write."),
    model: str | None = typer.Option(
        None, help="The base model (Hugging Face id or folder): shapes and names are checked."
    ),
    basis: Path | None = typer.Option(
        None, help="Put the adapters onto this basis; else they keep or bring their own."
    ),
    max_error: float | None = typer.Option(
        None, help="Refuse over this relative error; 0.5 with --basis, else none by default."
    ),
    from_merged: bool = typer.Option(
        False, "--from-merged", help="PATHs are whole models that were made from MODEL."
    ),
    rank: int | None = typer.Option(
        None, min=1, help="With --from-merged: the rank to keep of each delta."
    ),
    boosters: bool = typer.Option(
        False, "--boosters", help="PATHs hold folders of LoRAs, the numbered steps of one model."
    ),
    prefix: int | None = typer.Option(None, min=1, help="With --boosters: only the first so many."),
    force: bool = typer.Option(False, "--force", help="Replace an existing folder of adapters."),
    as_json: bool = JSON_FLAG,
) -> None:
    """Make adapters of LoRA-SB, LoRA-XS, PEFT, SoRA and other checkpoints.

    Writes DIR/<name>.safetensors for each, and DIR/basis.safetensors where they bring their own.
    """
    from lorasb_runtime.importing.run import ImportConfig, import_checkpoints

    config = ImportConfig(model, basis, max_error, from_merged, rank, boosters, prefix)
    with phases() as report:
        result = import_checkpoints(paths, config, output, force=force, report=report)
    targets = {target.module for target in result.basis.targets}
    for adapter in result.adapters:
        _warn(adapter, targets)
    emit(_as_json(output, result), _as_text(output, result), as_json)


def _warn(adapter: "Imported", targets: set[str]) -> None:
    left_out = adapter.info.get("left_out", {"tensors": []})
    names = [*left_out["tensors"], *adapter.info.get("added", [])]
    if names:
        note(
            f"warning: {adapter.source} differs from the base model in {len(names)} tensors that "
            f"no adapter can hold ({names[0]}, ...); they are left out"
        )
    missed = [module for module in adapter.fits or () if module not in targets]
    if missed:
        note(
            f"warning: {len(missed)} modules of {adapter.source} are no targets of the basis "
            f"({missed[0]}, ...); their deltas are lost"
        )


def _as_text(output: Path, result: "ImportResult") -> str:
    lines = []
    if result.basis_file is not None:
        basis = result.basis
        low, high = min(t.rank for t in basis.targets), max(t.rank for t in basis.targets)
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        lines.append(f"{result.basis_file}: {len(basis.targets)} modules, {ranks}")
        guess = basis.info.get("guess")
        if guess is not None:
            lines.append(
                f"  looks like {guess['method'] or 'neither lora-sb nor lora-xs'} (a guess)"
            )
    for adapter in result.adapters:
        lines += _lines(adapter)
    return "\n".join(lines)


def _lines(adapter: "Imported") -> list[str]:
    version, size = adapter.adapter.version[:12], adapter.adapter.cores.numel()
    lines = [f"{adapter.file}: {adapter.format}, version {version}, {size:,} numbers"]
    total = adapter.total
    if adapter.fits is None or total is None:
        return [*lines, "  cores as they were"]
    lines.append(f"  relative error {total.relative_error:.2e}, {_kept(adapter, total):.1%} kept")
    worst = sorted(adapter.fits.items(), key=lambda item: -item[1].relative_error)[:WORST]
    shown = ", ".join(f"{module} {fit.relative_error:.2e}" for module, fit in worst)
    return [*lines, f"  worst: {shown}"]


def _kept(adapter: "Imported", total: "Fit") -> float:
    """Share of the delta's energy that is in the adapter, of all that the checkpoint changed."""
    left_out = adapter.info.get("left_out", {"norm": 0.0})["norm"]
    whole = total.delta + left_out**2
    return (total.delta - total.error) / whole if whole else 1.0


def _as_json(output: Path, result: "ImportResult") -> dict[str, Any]:
    basis_file = None if result.basis_file is None else str(result.basis_file)
    return {
        "output": str(output),
        "basis": result.basis.digest,
        "basis_file": basis_file,
        "targets": len(result.basis.targets),
        "scaling": result.basis.scaling,
        "adapters": [_adapter_json(adapter) for adapter in result.adapters],
    }


def _adapter_json(adapter: "Imported") -> dict[str, Any]:
    shown: dict[str, Any] = {
        "name": adapter.adapter.name,
        "file": str(adapter.file),
        "source": adapter.source,
        "format": adapter.format,
        "version": adapter.adapter.version,
        "dtype": str(adapter.adapter.cores.dtype).removeprefix("torch."),
        "info": adapter.info,
    }
    total = adapter.total
    if adapter.fits is not None and total is not None:
        shown["relative_error"] = total.relative_error
        shown["energy_kept"] = _kept(adapter, total)
        shown["modules"] = {
            m: {"norm": math.sqrt(fit.delta), "relative_error": fit.relative_error}
            for m, fit in adapter.fits.items()
        }
    return shown
