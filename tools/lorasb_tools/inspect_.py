"""`lorasb inspect`: what a basis, an adapter, a pack, a store, a model or a checkpoint holds."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorasb_tools.report import JSON_FLAG, emit, note, phases, table, value_text

if TYPE_CHECKING:
    from lorasb_runtime.inspecting.inspection import AdapterRow, Inspection, ModuleRow

SHOWN = 40  # adapters that are shown to people; --json has all


def inspect(
    source: str = typer.Argument(help="A file, a folder or a store's URL."),
    basis: Path | None = typer.Option(None, help="The basis of the adapter or adapters."),
    plot: Path | None = typer.Option(None, help="Draw what was found into this picture file."),
    every_module: bool = typer.Option(
        False, "--modules", help="A line for each module, not for each kind of module."
    ),
    as_json: bool = JSON_FLAG,
) -> None:
    """Show what SOURCE holds: targets, ranks, norms, effective rank, bytes, digest, origin.

    With --plot: a basis' singular values, an adapter's norms by layer and module, or a map of the
    distances between the adapters of a store, a pack or a folder.
    """
    from lorasb_runtime.inspecting.inspect import inspect as look
    from lorasb_runtime.inspecting.picture import draw

    with phases() as report:
        found = look(source, basis, report)
    if plot is not None:
        draw(found, plot)
    for text in found.notes:
        note(text)
    emit(found.as_json(), "\n".join(_lines(found, every_module)), as_json)


def _lines(found: "Inspection", every_module: bool) -> list[str]:
    lines = [f"{found.source}: {found.kind}"]
    lines += _facts(found.facts, "  ")
    if found.modules:
        if found.spectrum_of:
            lines += [f"  norm and effective rank are of: {found.spectrum_of}"]
        lines += ["", *(_each(found.modules) if every_module else _kinds(found.modules))]
    if found.adapters:
        lines += [f"  distances: between {found.distance_of}", "", *_adapters(found.adapters)]
    if found.tensors:
        rows = [[value_text(value) for value in row.values()] for row in found.tensors]
        lines += ["", *table(list(found.tensors[0]), rows)]
    return lines


def _facts(facts: dict[str, Any], margin: str) -> list[str]:
    """A line for each fact; one that has parts is a heading over them."""
    lines = []
    for key, value in facts.items():
        name = f"{margin}{key.replace('_', ' ')}:"
        if isinstance(value, dict) and value:
            lines += [name, *_facts(value, margin + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            parts = [f"{margin}  {value_text(part)}" for part in value[:SHOWN]]
            more = [f"{margin}  and {len(value) - SHOWN} more"] if len(value) > SHOWN else []
            lines += [name, *parts, *more]
        else:
            lines.append(f"{name} {value_text(value)}")
    return lines


def _each(rows: "tuple[ModuleRow, ...]") -> list[str]:
    head = ("module", "out", "in", "rank", "norm", "effective rank")
    return table(
        head,
        [
            (
                row.module,
                *(str(row.out_features), str(row.in_features), str(row.rank)),
                f"{row.norm:.4g}" if row.spectrum else "",
                f"{row.effective_rank:.2f}" if row.spectrum else "",
            )
            for row in rows
        ],
    )


def _kinds(rows: "tuple[ModuleRow, ...]") -> list[str]:
    """A line for all modules of a kind and shape: ranges of their ranks and norms."""
    from lorasb_runtime.inspecting.picture import split_module

    groups: dict[tuple[str, int, int], list[ModuleRow]] = {}
    for row in rows:
        key = (split_module(row.module)[1], row.out_features, row.in_features)
        groups.setdefault(key, []).append(row)
    lines = []
    for (kind, out, into), members in groups.items():
        norms = [row.norm for row in members if row.spectrum]
        ranks = [row.effective_rank for row in members if row.spectrum]
        low, high = min(row.rank for row in members), max(row.rank for row in members)
        lines.append(
            (
                *(kind, str(len(members)), str(out), str(into)),
                str(low) if low == high else f"{low}-{high}",
                f"{sum(n**2 for n in norms) ** 0.5:.4g}" if norms else "",
                f"{min(norms):.4g}" if norms else "",
                f"{max(norms):.4g}" if norms else "",
                f"{sum(ranks) / len(ranks):.2f}" if ranks else "",
            )
        )
    head = ("modules", "count", "out", "in", "rank", "norm", "least", "most", "effective rank")
    return table(head, lines)


def _adapters(rows: "tuple[AdapterRow, ...]") -> list[str]:
    head = ("adapter", "version", "bytes", "norm", "nearest", "distance")
    lines = [
        (
            *(row.name, row.version[:12], f"{row.nbytes:,}", f"{row.norm:.4g}"),
            *(row.nearest or "", "" if row.distance is None else f"{row.distance:.4g}"),
        )
        for row in rows[:SHOWN]
    ]
    more = len(rows) - SHOWN
    return [*table(head, lines), *([f"and {more} more (--json has all)"] if more > 0 else [])]
