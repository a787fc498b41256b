"""`lorasb publish`: puts an adapter, or a folder of them, into a store."""

from pathlib import Path

import typer

from lorasb_runtime.errors import InputError
from lorasb_tools.report import JSON_FLAG, emit, phases


def publish(
    adapter: Path = typer.Argument(help="The adapter file, or a folder of them."),
    store: str = typer.Argument(help="Folder or fsspec URL of the adapter store."),
    name: str | None = typer.Argument(
        None, help="NAME or namespace/NAME to publish it under; for a folder a namespace."
    ),
    as_json: bool = JSON_FLAG,
) -> None:
    """Put an adapter file into a store and make it the current version of NAME.

    Of a folder every adapter is published, under its file's name without the ending.
    """
    if adapter.is_dir():
        _publish_folder(adapter, store, name, as_json)
        return
    if name is None:
        raise InputError(f"{adapter}: found a file and no NAME, expected the name to publish it by")

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


def _publish_folder(folder: Path, store: str, namespace: str | None, as_json: bool) -> None:
    from lorasb_runtime.adapters.names import parse_namespace
    from lorasb_runtime.adapters.publishing import publish_folder
    from lorasb_runtime.adapters.store import AdapterStore

    if namespace is not None:
        parse_namespace(namespace)
    with phases() as report:
        published = publish_folder(
            folder,
            AdapterStore(store),
            namespace,
            lambda done, total: report("publish", done, total, ""),
        )
    rows = [{"name": str(name), "version": version} for name, version in published.items()]
    emit({"store": store, "published": rows}, f"published {len(rows)} adapters", as_json)
