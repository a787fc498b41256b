"""`lorasb pack`: the adapters of a store in one file that servers map into memory."""

from pathlib import Path

import typer

from lorasb_tools.report import JSON_FLAG, emit, phases


def pack(
    store: str = typer.Argument(help="Folder or fsspec URL of the adapter store."),
    names: list[str] = typer.Argument(None, help="Adapters to pack; all by default."),
    output: Path = typer.Option(..., "-o", "--output", help="The pack file to write."),
    force: bool = typer.Option(False, "--force", help="Replace an existing file."),
    as_json: bool = JSON_FLAG,
) -> None:
    """Put the current version of a store's adapters into one file, for `serve --pack`."""
    from lorasb_runtime.adapters.names import parse_name
    from lorasb_runtime.adapters.packing import pack_store
    from lorasb_runtime.adapters.store import AdapterStore

    wanted = [parse_name(name) for name in names] if names else None
    with phases() as report:
        packed = pack_store(
            AdapterStore(store),
            output,
            wanted,
            lambda done, total: report("packing", done, total, ""),
            force=force,
        )
    nbytes = output.stat().st_size
    result = {
        "pack": str(output),
        "adapters": len(packed),
        "basis": packed.basis,
        "dtype": str(packed.dtype).removeprefix("torch."),
        "bytes": nbytes,
    }
    emit(result, f"{output}: {len(packed)} adapters, {nbytes:,} bytes", as_json)
