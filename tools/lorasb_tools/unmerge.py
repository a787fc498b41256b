"""`lorasb unmerge`: from a merged model back to the one that it was made from."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lorasb_runtime.errors import InputError
from lorasb_tools import merge_flags
from lorasb_tools.report import JSON_FLAG, emit, phases

if TYPE_CHECKING:
    from lorasb_runtime.merging.unmerge import UnmergeReport
    from lorasb_runtime.storage.checkpoint import Checkpoint

SHOWN = 5  # of the modules, those of which least is certain


def unmerge(
    model: Path = typer.Argument(help="A model folder that `lorasb merge` wrote."),
    adapters: list[Path] = typer.Argument(
        None, help="The adapters that were merged; not needed after merge --reversible."
    ),
    basis: Path | None = typer.Option(None, help="Their basis file."),
    output: Path = merge_flags.OUTPUT,
    force: bool = merge_flags.FORCE,
    as_json: bool = JSON_FLAG,
) -> None:
    """Write the model as it was before, and say how exactly.

    After `merge --reversible` every byte is restored and checked. Otherwise the same adapters are
    taken out again, with the weights that the merged model's headers record.
    """
    from lorasb_runtime.merging.folder_files import UNDO
    from lorasb_runtime.storage.checkpoint import open_checkpoint

    merged = open_checkpoint(model)
    if not (model / UNDO).is_file():
        if basis is None or not adapters:
            raise InputError(
                f"{model}: found no {UNDO}, expected one (merge --reversible writes it), or "
                "--basis and the adapters that were merged"
            )
        _subtract(merged, adapters, basis, output, force, as_json)
    elif adapters or basis is not None:
        raise InputError(f"{model}: found {UNDO}, expected neither --basis nor adapters beside it")
    else:
        _undo(merged, output, force, as_json)


def _undo(merged: "Checkpoint", output: Path, force: bool, as_json: bool) -> None:
    from lorasb_runtime.merging.undo_merge import undo_merge

    with phases(in_bytes=True) as report:
        shards = undo_merge(merged, output, force=force, report=report)
    text = f"{output}: every byte of {', '.join(shards)} restored, as their SHA-256 digests say"
    emit({"output": str(output), "exact": True, "shards": shards}, text, as_json)


def _subtract(
    merged: "Checkpoint",
    adapters: list[Path],
    basis: Path,
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    from lorasb_runtime.merging import find_method
    from lorasb_runtime.merging.method_deltas import method_deltas
    from lorasb_runtime.merging.record import MergeRecord
    from lorasb_runtime.merging.unmerge import check_adapters, check_basis_of, unmerge
    from lorasb_runtime.storage.adapter_file import load_adapter
    from lorasb_runtime.storage.basis_file import map_basis

    record = MergeRecord.read(merged)
    if record is None:
        raise InputError(f"{merged.folder}: found no record of a merge in it, expected lorasb's")
    loaded = map_basis(basis)
    check_basis_of(record, loaded)
    weighted = check_adapters(record, [load_adapter(path, loaded) for path in adapters])
    said = record.as_json()
    method = find_method(said.get("method", "")).with_options(said.get("options", {}))
    deltas = method_deltas(weighted, loaded, method)
    with phases(in_bytes=True) as report:
        result = unmerge(merged, record, loaded, deltas, output, force=force, report=report)
    _tell(output, result, as_json)


def _tell(output: Path, result: "UnmergeReport", as_json: bool) -> None:
    worst = sorted(result.modules, key=lambda name: result.modules[name].share)[:SHOWN]
    fingerprint = {
        True: "is the recorded one, which samples three blocks of every tensor",
        False: "is not the recorded one: some weights differ from those before the merge",
        None: "was not recorded",
    }[result.matches]
    lines = [
        f"{output}: {len(result.modules)} modules restored by subtraction",
        f"  {result.total.share:.4%} of their entries can only have been what they are now; all "
        f"others lie within {result.steps} of the merged dtype's steps of what they were",
        *(f"  {result.modules[name].share:>9.4%} in {name}" for name in worst),
        f"  the model's fingerprint {fingerprint}",
    ]
    value = {
        "output": str(output),
        "exact": None if result.total.share < 1 else bool(result.matches),
        "certain": result.total.share,
        "fingerprint_matches": result.matches,
        "modules": {name: found.share for name, found in result.modules.items()},
    }
    emit(value, "\n".join(lines), as_json)
