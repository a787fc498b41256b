"""`lorasb adapters`, `lorasb rollback`, `lorasb prune`: what lies in a store."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import typer

from lorasb_runtime.errors import ConflictError
from lorasb_tools.report import JSON_FLAG, emit, note

if TYPE_CHECKING:
    from lorasb_runtime.adapters.catalog import CatalogEntry

STORE = typer.Argument(help="Folder or fsspec URL of the adapter store.")
DAY_SECONDS = 86400.0


def adapters(store: str = STORE, as_json: bool = JSON_FLAG) -> None:
    """List a store's adapters with their current version, its size, basis and age."""
    from lorasb_runtime.adapters.catalog import list_adapters
    from lorasb_runtime.adapters.store import AdapterStore

    entries = list_adapters(AdapterStore(store))
    text = "\n".join(_line(entry) for entry in entries) or "no adapters"
    emit({"store": store, "adapters": [_row(entry) for entry in entries]}, text, as_json)


def rollback(
    store: str = STORE,
    name: str = typer.Argument(help="NAME or namespace/NAME."),
    version: str | None = typer.Argument(
        None, help="A stored version, or its first digits; the one before the current by default."
    ),
    as_json: bool = JSON_FLAG,
) -> None:
    """Make an earlier version of NAME current again."""
    from lorasb_runtime.adapters.names import parse_name
    from lorasb_runtime.adapters.store import AdapterStore, previous_version, version_starting

    opened, target = AdapterStore(store), parse_name(name)
    opened.files.need_writable()
    stored = opened.versions(target)
    if version is None:
        chosen = previous_version(stored, target)
    else:
        chosen = version_starting(stored, target, version)
    opened.rollback(target, chosen)
    before = next((v.version for v in stored if v.current), None)
    result = {"name": str(target), "version": chosen, "previous": before, "store": store}
    emit(result, f"{target} is at version {chosen[:12]} again", as_json)


def prune(
    store: str = STORE,
    names: list[str] = typer.Argument(None, help="Adapters to prune; all by default."),
    keep: int = typer.Option(..., min=0, help="Old versions to keep, besides the current one."),
    older_than: float = typer.Option(0.0, min=0.0, help="Remove only versions of so many days."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only say what would be removed."),
    as_json: bool = JSON_FLAG,
) -> None:
    """Remove old versions, and what killed writers left an hour ago or earlier."""
    from lorasb_runtime.adapters.names import parse_name
    from lorasb_runtime.adapters.prune import PruneConfig
    from lorasb_runtime.adapters.prune import prune as prune_store
    from lorasb_runtime.adapters.store import AdapterStore

    config = PruneConfig(keep, older_than * DAY_SECONDS, dry_run=dry_run)
    wanted = [parse_name(name) for name in names] if names else None
    report = prune_store(AdapterStore(store), config, wanted)
    for problem in report.problems:
        note(f"left alone: {problem}")
    freed = sum(v.nbytes for v in report.versions)
    removed = [{"name": str(v.name), "version": v.version} for v in report.versions]
    result = {
        "store": store,
        "dry_run": dry_run,
        "removed": removed,
        "bytes": freed,
        "leftovers": list(report.leftovers),
        "problems": list(report.problems),
    }
    verb = "would remove" if dry_run else "removed"
    lines = [f"{v.name} {v.version[:12]}" for v in report.versions]
    lines.append(
        f"{verb} {len(removed)} versions ({freed:,} bytes) and {len(report.leftovers)} leftovers"
    )
    emit(result, "\n".join(lines), as_json)
    if report.problems:
        raise ConflictError(f"{len(report.problems)} adapters could not be pruned")


def _row(entry: "CatalogEntry") -> dict[str, Any]:
    return {
        "name": str(entry.name),
        "version": entry.version,
        "versions": entry.versions,
        "bytes": entry.nbytes,
        "basis": entry.basis,
        "modified": entry.modified.isoformat() if entry.modified else None,
        "problem": entry.problem,
    }


def _line(entry: "CatalogEntry") -> str:
    if entry.problem is not None or entry.version is None or entry.basis is None:
        return f"{entry.name!s:<40} damaged: {entry.problem}"
    return (
        f"{entry.name!s:<40} {entry.version[:12]}  {entry.versions:>4} versions  "
        f"{entry.nbytes:>12,} bytes  basis {entry.basis.removeprefix('sha256:')[:12]}  "
        f"{_age(entry.modified)}"
    )


def _age(modified: datetime | None) -> str:
    if modified is None:
        return ""
    seconds = (datetime.now(UTC) - modified).total_seconds()
    for size, unit in ((DAY_SECONDS, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} seconds ago"
