"""`lorasb diff`: how two adapters, two bases or two models differ."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorasb_tools.report import JSON_FLAG, emit, note, phases, table, value_text

if TYPE_CHECKING:
    from lorasb_runtime.inspecting.difference import Difference

SHOWN = 20  # modules or tensors that are shown to people; --json has all


def diff(
    a: Path = typer.Argument(help="An adapter, a basis or a model folder."),
    b: Path = typer.Argument(help="Another of the same kind."),
    basis: Path | None = typer.Option(
        None, help="The adapters' basis: distances between merged weights, and for each module."
    ),
    as_json: bool = JSON_FLAG,
) -> None:
    """Compare two adapters (distance, angle), two bases (angles between their subspaces) or two
    models (which tensors differ, and by how much)."""
    from lorasb_runtime.inspecting.diff import diff as compare

    with phases() as report:
        found = compare(a, b, basis, report)
    for text in found.notes:
        note(text)
    emit({"a_path": str(a), "b_path": str(b), **found.as_json()}, "\n".join(_lines(found)), as_json)


def _lines(found: "Difference") -> list[str]:
    lines = [f"{key.replace('_', ' ')}: {_fact(value)}" for key, value in found.facts.items()]
    if not found.rows:
        return lines
    rows = [[value_text(value) for value in row.values()] for row in found.rows[:SHOWN]]
    head = [key.replace("_", " ") for key in found.rows[0]]
    more = len(found.rows) - SHOWN
    tail = [f"and {more} more (--json has all)"] if more > 0 else []
    return [*lines, "", *table(head, rows), *tail]


def _fact(value: Any) -> str:
    """Long lists of names by their beginning."""
    if isinstance(value, list):
        names = ", ".join(map(str, value[:3])) + (", ..." if len(value) > 3 else "")
        return f"{len(value)} ({names})" if value else "none"
    return value_text(value)
