"""How commands speak: results on stdout (text or JSON), progress and notes on stderr."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from lorasb_runtime.types import Report

JSON_FLAG = typer.Option(False, "--json", help="Print the result as one JSON object.")

stderr = Console(stderr=True, highlight=False, soft_wrap=True)

LONGEST = 400  # characters of a value that are shown to people


def emit(result: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a command's result: `text` for people or `result` as one line of JSON."""
    typer.echo(json.dumps(result, ensure_ascii=False) if as_json else text)


def note(text: str) -> None:
    """Tell the person at the terminal something that is not the result."""
    stderr.print(text, markup=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns; those whose cells are numbers are set to the right."""
    columns = list(zip(head, *rows, strict=True))
    lines = []
    for cells in (head, *rows):
        parts = []
        for cell, column in zip(cells, columns, strict=True):
            width = max(len(text) for text in column)
            right = any(column[1:]) and all(_is_number(text) for text in column[1:])
            parts.append(cell.rjust(width) if right else cell.ljust(width))
        lines.append("  ".join(parts).rstrip())
    return lines


def value_text(value: Any) -> str:
    """Numbers as people read them, anything else as compact JSON."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... (--json has all)"


def _is_number(text: str) -> bool:
    return not text.strip("0123456789.,+-e %") if text else True


@contextmanager
def phases(*, in_bytes: bool = False) -> Iterator[Report]:
    """Progress bars on stderr, one for each phase that is reported.

    The yielded function takes the phase's name, the units done, their total and a short note.
    in_bytes: the units are bytes, and their speed is shown.
    """
    counts: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),)
    if in_bytes:
        counts = (DownloadColumn(), TransferSpeedColumn())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *counts,
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=stderr) as bar:

        def report(phase: str, done: int, total: int, text: str = "") -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total, note=text)
            bar.update(tasks[phase], completed=done, total=total, note=text)

        yield report
