"""`lorasb publish`: puts an adapter into a store."""

from pathlib import Path

import typer

from lorasb_tools.report import JSON_FLAG, emit


def publish(
    adapter: Path = typer.Argument(help="The adapter file."),
    store: str = typer.Argument(help="Folder or fsspec URL of the adapter store."),
    name: str = typer.Argument(help="NAME or namespace/NAME to publish it under."),
    as_json: bool = JSON_FLAG,
) -> None:
    """Put an adapter file into a store and make it the current version of NAME."""
    from lorasb_runtime.adapters.names import parse_name
    from lorasb_runtime.adapters.store import AdapterStore
    from lorasb_runtime.storage import tensor_file
    from lorasb_runtime.storage.adapter_file import parse_adapter

    target = parse_name(name)
    data = tensor_file.read_file(adapter)
    parse_adapter(data, str(adapter))
    version = AdapterStore(store).publish(target, data)
    result = {"name": str(target), "version": version, "bytes": len(data), "store": store}
    emit(result, f"published {target} version {version[:12]} ({len(data):,} bytes)", as_json)
