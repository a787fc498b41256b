"""How commands speak: results on stdout (text or JSON), progress and notes on stderr."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

JSON_FLAG = typer.Option(False, "--json", help="Print the result as one JSON object.")

stderr = Console(stderr=True, highlight=False, soft_wrap=True)

Advance = Callable[[int, str], None]


def emit(result: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a command's result: `text` for people or `result` as one line of JSON."""
    typer.echo(json.dumps(result, ensure_ascii=False) if as_json else text)


def note(text: str) -> None:
    """Tell the person at the terminal something that is not the result."""
    stderr.print(text, markup=False)


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """A progress bar on stderr; the yielded function takes the units done and a short note."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=stderr, transient=False) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(completed: int, text: str = "") -> None:
            bar.update(task, completed=completed, note=text)

        yield advance
