"""Settings as they are shown: as a settings file, for machines, and as the table in the docs."""

import json
from typing import Any, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from lorasb_server.settings.declared import Settings, flag_of, key_of, variable_of
from lorasb_server.settings.sources import Sourced

HIDDEN = "(set, not shown)"


def as_file(sourced: Sourced) -> str:
    """TOML that is a settings file by itself, each value with where it came from."""
    lines = []
    for name in Settings.model_fields:
        value, origin = getattr(sourced.settings, name), sourced.origins[name]
        if value is None or isinstance(value, SecretStr) or name == "config":
            shown = "not set" if value is None else plain(value)
            lines.append((f"# {key_of(name)}: {shown}", origin))
        else:
            lines.append((f"{key_of(name)} = {_toml(plain(value))}", origin))
    return "\n".join(f"{text:<40}  # {origin}" for text, origin in lines)


def as_object(sourced: Sourced) -> dict[str, Any]:
    """By key the value and where it came from."""
    return {
        key_of(name): {
            "value": plain(getattr(sourced.settings, name)),
            "from": sourced.origins[name],
        }
        for name in Settings.model_fields
    }


def as_table() -> str:
    """Every setting as a row in Markdown, under the headings of their groups."""
    lines: list[str] = []
    group = ""
    for name, field in Settings.model_fields.items():
        if group_of(field) != group:
            group = group_of(field)
            lines += ["", f"## {group}", "", "| flag | variable | | default |", "|---|---|---|---|"]
        text, shown = text_of(field), default_of(field) or "-"
        lines.append(f"| `{flag_of(name)}` | `{variable_of(name)}` | {text} | {shown} |")
    return "\n".join(lines[1:])


def group_of(field: FieldInfo) -> str:
    assert isinstance(field.json_schema_extra, dict)
    return str(field.json_schema_extra["group"])


def default_of(field: FieldInfo) -> str:
    """The default as text, empty where there is none."""
    value = field.default
    if value is False or value in (None, (), ""):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def text_of(field: FieldInfo) -> str:
    """What a setting is, and which values it may have."""
    bounds = _bounds(field)
    return f"{field.description} {bounds.capitalize()}." if bounds else str(field.description)


def is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _bounds(field: FieldInfo) -> str:
    """Empty where any value of the type will do."""
    choices = [arg for arg in get_args(field.annotation) if isinstance(arg, str)]
    if choices:
        return f"one of {', '.join(choices)}"
    words = []
    for bound in field.metadata:
        match bound:
            case Ge(ge=least):
                words.append(f"from {least:g}")
            case Gt(gt=least):
                words.append(f"over {least:g}")
            case Le(le=most):
                words.append(f"to {most}")
    return " ".join(words)


def plain(value: Any) -> Any:
    """A value as JSON has it; of a secret, that it is there."""
    if isinstance(value, SecretStr):
        return HIDDEN
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, int | float | None) else str(value)


def _toml(value: Any) -> str:
    """JSON's texts, numbers, booleans and lists of text are TOML's."""
    return json.dumps(value, ensure_ascii=False)
