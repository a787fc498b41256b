"""`lorasb merge`: folds adapters into a Hugging Face checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorasb_tools.report import JSON_FLAG, emit, note, phases

if TYPE_CHECKING:
    from lorasb_runtime.merging.checkpoint import MergeReport
    from lorasb_runtime.merging.fold import Survival

WARN_UNDER = 0.9


def merge(
    model: str = typer.Argument(help="Hugging Face id or local folder."),
    adapters: list[str] = typer.Argument(help="ADAPTER or ADAPTER=WEIGHT, one or several."),
    basis: Path = typer.Option(..., help="The adapters' basis file."),
    output: Path = typer.Option(..., "-o", "--output", help="The folder to write."),
    method: str = typer.Option("linear", help="How several adapters become one."),
    dtype: str | None = typer.Option(
        None, help="bfloat16, float16 or float32; the checkpoint's own by default."
    ),
    force: bool = typer.Option(False, "--force", help="Replace an existing model folder."),
    as_json: bool = JSON_FLAG,
) -> None:
    """Fold one or several weighted adapters into MODEL's weights, shard by shard."""
    from lorasb_runtime.merging import find_method
    from lorasb_runtime.merging.checkpoint import merge_checkpoint
    from lorasb_runtime.merging.combine import combine_adapters
    from lorasb_runtime.merging.delta import core_deltas
    from lorasb_runtime.merging.provenance import describe_merge
    from lorasb_runtime.merging.weighted import load_weighted
    from lorasb_runtime.models.load import parse_dtype
    from lorasb_runtime.models.locate import identify, open_model
    from lorasb_runtime.ops.core_matmul import scale_core
    from lorasb_runtime.storage.basis_file import load_basis

    combine = find_method(method)
    wanted = parse_dtype(dtype) if dtype is not None else None
    loaded = load_basis(basis)
    weighted = [load_weighted(text, loaded) for text in adapters]
    cores = combine_adapters(weighted, loaded, combine)
    source = open_model(model)
    provenance = describe_merge(identify(model, source), loaded, weighted, method)
    with phases() as report:
        result = merge_checkpoint(
            source,
            loaded,
            core_deltas(loaded, scale_core(cores, loaded.scaling)),
            output,
            dtype=wanted,
            provenance=provenance,
            force=force,
            report=report,
        )
    _tell(output, result, as_json)


def _tell(output: Path, result: "MergeReport", as_json: bool) -> None:
    total, worst = result.total, result.least_kept
    if total.kept < WARN_UNDER:
        note(
            f"warning: rounding to the output dtype left only {total.kept:.1%} of the delta; "
            "write --dtype float32, or serve the adapter unmerged"
        )
    text = (
        f"{output}: {len(result.modules)} modules merged\n"
        f"  rms(delta) / rms(W) {total.ratio:.2e}, {total.kept:.1%} of the delta survived the "
        f"rounding, relative error {total.relative_error:.2e}\n"
        f"  least of all in {worst}: {result.modules[worst].kept:.1%}"
    )
    modules = {name: _figures(survival) for name, survival in result.modules.items()}
    emit({"output": str(output), **_figures(total), "modules": modules}, text, as_json)


def _figures(survival: "Survival") -> dict[str, Any]:
    return {
        "delta_ratio": survival.ratio,
        "kept": survival.kept,
        "relative_error": survival.relative_error,
    }
