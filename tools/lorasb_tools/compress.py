"""`lorasb compress`: many ordinary LoRAs become one joint basis and an adapter each."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorasb_tools.report import JSON_FLAG, emit, note, phases, table

if TYPE_CHECKING:
    from lorasb_runtime.importing.compress import Compressed, CompressedBasis, CompressResult

SHOWN = 20  # adapters that are shown to people, worst first; --json has all
MANY = 100  # adapters, above which the method's authors find clusters needed
GOOD = 0.6  # relative error under which they saw no loss of quality


def compress(
    loras: list[Path] = typer.Argument(help="Folders of LoRAs, one adapter each."),
    output: Path = typer.Option(..., "-o", "--output", help="The folder to write."),
    rank: int = typer.Option(..., min=1, help="Rank of the joint basis, at most."),
    clusters: int = typer.Option(
        1, min=1, help="Sort the LoRAs into so many clusters, each with a basis of its own."
    ),
    model: str | None = typer.Option(
        None, help="The base model (Hugging Face id or folder): shapes and names are checked."
    ),
    max_error: float | None = typer.Option(
        None, help="Refuse if an adapter's relative error is over this; no limit by default."
    ),
    seed: int = typer.Option(0, help="Of the random starts; the same seed gives the same files."),
    force: bool = typer.Option(False, "--force", help="Replace an existing folder of adapters."),
    as_json: bool = JSON_FLAG,
) -> None:
    """Put a collection of LoRAs of one model onto a joint basis, with the least error.

    Writes DIR/basis.safetensors and DIR/<name>.safetensors for each LoRA, with several clusters
    in a folder DIR/cluster-<n> for each, as one server has one basis.
    """
    from lorasb_runtime.importing.compress import CompressConfig
    from lorasb_runtime.importing.compress import compress as compress_loras

    config = CompressConfig(rank, clusters, model, max_error, seed)
    with phases() as report:
        result = compress_loras(loras, config, output, force=force, report=report)
    if len(result.base_models) > 1:
        named = ", ".join(result.base_models[:3])
        note(f"warning: the LoRAs name {len(result.base_models)} base models ({named}, ...)")
    emit(_as_json(output, result), _as_text(output, result), as_json)


def _as_text(output: Path, result: "CompressResult") -> str:
    lines = [line for basis in result.bases for line in _basis_lines(basis)]
    worst = sorted(result.adapters, key=lambda one: -one.relative_error)
    many = len(result.bases) > 1
    rows = [
        (
            one.name,
            *((str(one.cluster),) if many else ()),
            f"{one.relative_error:.3g}",
            one.worst,
            f"{one.fits[one.worst].relative_error:.3g}",
        )
        for one in worst[:SHOWN]
    ]
    head = ("adapter", *(("cluster",) if many else ()), "error", "worst module", "its error")
    lines += ["", *table(head, rows)]
    if len(worst) > SHOWN:
        lines.append(f"and {len(worst) - SHOWN} more with smaller errors (--json has all)")
    return "\n".join([*lines, "", _advice(result)])


def _basis_lines(basis: "CompressedBasis") -> list[str]:
    low, high = min(t.rank for t in basis.targets), max(t.rank for t in basis.targets)
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    curve = ", ".join(f"{rank}: {error:.3g}" for rank, error in basis.by_rank.items())
    return [
        f"{basis.file}: {basis.loras} adapters, {len(basis.targets)} modules, {ranks}",
        f"  an adapter is {basis.adapter_size:,} numbers; digest {basis.digest}",
        f"  mean relative error with the first directions alone, {curve}",
    ]


def _advice(result: "CompressResult") -> str:
    errors = [one.relative_error for one in result.adapters]
    mean = sum(errors) / len(errors)
    over = sum(error >= GOOD for error in errors)
    text = (
        f"Mean relative error {mean:.3g}; {over} of {len(errors)} adapters are at {GOOD} or more.\n"
        "The method's authors (arXiv 2407.00066) saw hardly any loss of quality while the mean\n"
        f"stayed under about {GOOD} on their LoRAs; on yours, try the worst adapters first."
    )
    if over and len(errors) > MANY and len(result.bases) == 1:
        text += f"\nAbove about {MANY} adapters they find several clusters needed (--clusters)."
    return text


def _as_json(output: Path, result: "CompressResult") -> dict[str, Any]:
    worst = sorted(result.adapters, key=lambda one: -one.relative_error)
    return {
        "output": str(output),
        "bases": [_basis_json(basis) for basis in result.bases],
        "adapters": [_adapter_json(one) for one in worst],
        "mean_error": sum(one.relative_error for one in worst) / len(worst),
        "base_models": result.base_models,
    }


def _basis_json(basis: "CompressedBasis") -> dict[str, Any]:
    return {
        "file": str(basis.file),
        "digest": basis.digest,
        "loras": basis.loras,
        "targets": len(basis.targets),
        "ranks": {t.module: t.rank for t in basis.targets},
        "adapter_size": basis.adapter_size,
        "mean_error_by_rank": basis.by_rank,
    }


def _adapter_json(one: "Compressed") -> dict[str, Any]:
    return {
        "name": one.name,
        "file": str(one.file),
        "source": one.source,
        "version": one.version,
        "cluster": one.cluster,
        "relative_error": one.relative_error,
        "worst_module": one.worst,
        "modules": {module: fit.relative_error for module, fit in one.fits.items()},
    }
