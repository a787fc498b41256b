"""`lorasb export`: an adapter in the format of another program."""

from pathlib import Path

import typer

from lorasb_runtime.errors import InputError
from lorasb_tools.report import JSON_FLAG, emit


def export(
    adapter: Path = typer.Argument(help="The adapter file."),
    basis: Path = typer.Option(..., help="The adapter's basis file."),
    output: Path = typer.Option(
        ..., "-o", "--output", help="The folder to write (peft), or the file (factors, delta)."
    ),
    kind: str = typer.Option("peft", "--format", help="peft, factors or delta."),
    model: str | None = typer.Option(
        None, help="The base model (Hugging Face id or folder): checked, and named in the output."
    ),
    dtype: str = typer.Option("float32", help="bfloat16, float16 or float32."),
    keep_ranks: bool = typer.Option(
        False,
        "--keep-ranks",
        help="peft: write rank_pattern where ranks differ, instead of padding; not for llama.cpp.",
    ),
    force: bool = typer.Option(False, "--force", help="Replace an existing output."),
    as_json: bool = JSON_FLAG,
) -> None:
    """Write an adapter as a PEFT LoRA, as its factors A, B and R, or as full deltas."""
    from lorasb_runtime.importing.exporters import Export, write_export
    from lorasb_runtime.models.load import parse_dtype
    from lorasb_runtime.models.locate import open_model
    from lorasb_runtime.storage.adapter_file import load_adapter
    from lorasb_runtime.storage.basis_file import load_basis
    from lorasb_runtime.storage.match import check_model

    if keep_ranks and kind != "peft":
        raise InputError(f"--keep-ranks goes with --format peft, found {kind}")
    wanted = parse_dtype(dtype)
    loaded = load_basis(basis)
    base_model = loaded.base_model.name if loaded.base_model else None
    if model is not None:
        check_model(loaded, open_model(model), str(basis))
        base_model = model
    exported = Export(load_adapter(adapter, loaded), loaded, base_model, wanted, keep_ranks)
    said = write_export(exported, kind, output, force=force)
    targets = len(loaded.targets)
    result = {"output": str(output), "format": kind, "dtype": dtype, "modules": targets, **said}
    lines = [f"{output}: {kind} in {dtype}, {targets} modules"]
    if "rank" in said:
        padded = f", {said['padded']} modules padded to it" if said["padded"] else ""
        lines.append(f"  rank {said['rank']}{padded}")
        limit = said["vllm_max_lora_rank"]
        lines.append(
            f"  vLLM: --max-lora-rank {limit}" if limit else "  too high a rank for vLLM (512)"
        )
    emit(result, "\n".join(lines), as_json)
