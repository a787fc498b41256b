"""`lorasb publish` and `lorasb adapters`: put an adapter into a store, and list a store."""

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


def adapters(
    store: str = typer.Argument(help="Folder or fsspec URL of the adapter store."),
    as_json: bool = JSON_FLAG,
) -> None:
    """List a store's adapters with their current version, its size and its age."""
    from lorasb_runtime.adapters.store import AdapterStore

    opened = AdapterStore(store)
    rows = []
    for name in opened.names():
        versions = opened.versions(name)
        current = next(v for v in versions if v.current)
        rows.append(
            {
                "name": str(name),
                "version": current.version,
                "versions": len(versions),
                "bytes": current.nbytes,
                "modified": current.modified.isoformat() if current.modified else None,
            }
        )
    lines = [
        f"{r['name']:<40} {str(r['version'])[:12]}  {r['versions']:>4} versions  "
        f"{r['bytes']:>12,} bytes  {r['modified'] or ''}"
        for r in rows
    ]
    emit({"store": store, "adapters": rows}, "\n".join(lines) or "no adapters", as_json)
