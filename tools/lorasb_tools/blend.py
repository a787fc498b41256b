"""`lorasb blend`: many adapters into one."""

from pathlib import Path

import typer

from lorasb_runtime.errors import ConflictError, InputError
from lorasb_tools.report import JSON_FLAG, emit


def blend(
    adapters: list[str] = typer.Argument(help="ADAPTER or ADAPTER=WEIGHT, one or several."),
    output: Path = typer.Option(..., "-o", "--output", help="The adapter file to write."),
    normalize: bool = typer.Option(
        False, "--normalize", help="Divide the weights by their sum; else they stay as given."
    ),
    dtype: str = typer.Option("float32", help="bfloat16, float16 or float32."),
    name: str | None = typer.Option(None, help="The adapter's name; the file's stem by default."),
    force: bool = typer.Option(False, "--force", help="Replace an existing file."),
    as_json: bool = JSON_FLAG,
) -> None:
    """Write the weighted sum of adapters of one basis as an adapter file.

    A weight may be negative; without one it is 1.
    """
    from lorasb_runtime.merging.blend import blend_adapters, normalized
    from lorasb_runtime.merging.weighted import load_weighted
    from lorasb_runtime.models.load import parse_dtype
    from lorasb_runtime.storage.adapter_file import save_adapter

    wanted = parse_dtype(dtype)
    if output.is_dir():
        raise InputError(f"{output}: found a folder, expected the adapter file to write")
    if output.exists() and not force:
        raise ConflictError(f"{output}: already exists; choose another output or pass --force")
    weighted = [load_weighted(text) for text in adapters]
    if normalize:
        weighted = normalized(weighted)
    made = blend_adapters(weighted, output.stem if name is None else name, wanted)
    saved = save_adapter(made, output)
    parts = saved.info["blend"]
    result = {
        "output": str(output),
        "name": saved.name,
        "version": saved.version,
        "basis": saved.basis,
        "dtype": dtype,
        "adapters": parts,
    }
    lines = [f"{output}: version {saved.version[:12]}, {saved.cores.numel():,} numbers in {dtype}"]
    lines += [f"  {p['weight']:+g} * {p['name']} {p['version'][:12]}" for p in parts]
    emit(result, "\n".join(lines), as_json)
