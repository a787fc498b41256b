"""The command line's flags of the server's settings, each from its declaration."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic.fields import FieldInfo

from lorasb_server.settings import Settings
from lorasb_server.settings.shown import default_of, group_of, is_list, text_of

Command = Callable[..., None]
WORDS: tuple[tuple[type, str], ...] = ((int, "INTEGER"), (float, "NUMBER"), (Path, "PATH"))


def with_setting_flags(command: Command) -> Command:
    """`command` takes what typer finds in its signature; this adds an option for each setting.

    They arrive as keywords, those that were not given as None or empty: what they mean, and
    whether they are right, is for `read_settings`.
    """
    own = inspect.signature(command).parameters.values()
    kept = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
    flags = [_parameter(name, field) for name, field in Settings.model_fields.items()]
    command.__dict__["__signature__"] = inspect.Signature([*flags, *kept])
    return command


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """Those of the flags that stood on the command line."""
    return {name: value for name, value in flags.items() if value not in (None, [], ())}


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    if name == "model":
        model = typer.Argument(None, help=field.description, show_default=False, metavar="MODEL")
        return _keyword(name, str | None, model)
    kind: Any = str | None
    if field.annotation is bool:
        kind = bool | None
    elif is_list(field):
        kind = list[str] | None
    option = typer.Option(
        None,
        help=_help(field),
        show_default=False,
        rich_help_panel=group_of(field),
        metavar=_word(field),
    )
    return _keyword(name, kind, option)


def _help(field: FieldInfo) -> str:
    words = [text_of(field)]
    if default := default_of(field):
        words.append(f"Default: {default}.")
    if is_list(field):
        words.append("May be given often.")
    return " ".join(words)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _word(field: FieldInfo) -> str | None:
    """What stands for the value in the help; None for a flag that has none."""
    if field.annotation is bool:
        return None
    kinds = (field.annotation, *get_args(field.annotation))
    return next((word for kind, word in WORDS if kind in kinds), "TEXT")
