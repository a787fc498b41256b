"""Brings the settings together: a flag wins over a variable, that over the file, that over the
default. Nothing else reads the environment. Unknown names are refused.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource

from lorasb_runtime.errors import FileFormatError, InputError, NotFoundError
from lorasb_server.settings.checks import check_settings
from lorasb_server.settings.declared import PREFIX, Settings, flag_of, key_of, variable_of

DEFAULT = "default"
# Names that others have given to some of our settings; our own variable wins.
STANDARD_VARIABLES = {"otlp_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT"}


@dataclass(frozen=True)
class Sourced:
    """The settings, and by name where each is from: `--flag`, `VARIABLE`, the file, or default."""

    settings: Settings
    origins: dict[str, str]


def read_settings(flags: Mapping[str, Any]) -> Sourced:
    """The settings under `flags`, those that were given, by name.

    Raises InputError for unknown, wrong or contradictory settings; NotFoundError and
    FileFormatError for the file.
    """
    variables, names = _environment()
    file = flags.get("config", variables.get("config"))
    keys = {} if file is None else _file(Path(file))
    values: dict[str, Any] = {**keys, **variables, **flags}
    origins = dict.fromkeys(Settings.model_fields, DEFAULT)
    origins |= dict.fromkeys(keys, str(file)) | names
    origins |= {name: flag_of(name) for name in flags}
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise InputError(_complaint(error, origins)) from None
    check_settings(settings)
    return Sourced(settings, origins)


def _environment() -> tuple[dict[str, Any], dict[str, str]]:
    """Values by setting, and the variable that each was in. An empty variable is not set."""
    known = {variable_of(name) for name in Settings.model_fields}
    for variable in os.environ:
        if variable.upper().startswith(PREFIX) and variable.upper() not in known:
            raise InputError(f"environment: unknown variable {variable}{_nearest(variable, known)}")
    values = EnvSettingsSource(Settings)()
    names = {name: variable_of(name) for name in values}
    for name, variable in STANDARD_VARIABLES.items():
        if name not in values and os.environ.get(variable):
            values[name], names[name] = os.environ[variable], variable
    return values, names


def _file(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(str(path), f"no TOML ({error})", "settings") from None
    known = {key_of(name): name for name in Settings.model_fields if name != "config"}
    for key in content:
        if key not in known:
            raise InputError(f"{path}: unknown setting {key!r}{_nearest(key, known)}")
    return {known[key]: value for key, value in content.items()}


def _nearest(word: str, known: Iterable[str]) -> str:
    by_upper = {name.upper(): name for name in known}
    found = difflib.get_close_matches(word.upper(), by_upper, n=1)
    return f"; did you mean {by_upper[found[0]]}?" if found else ""


def _complaint(error: ValidationError, origins: Mapping[str, str]) -> str:
    """The first of pydantic's complaints in a line, under the name that the value was given by."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    origin = origins[name]
    named = origin in (flag_of(name), variable_of(name))
    where = origin if named else f"{origin}: {key_of(name)}"
    found = "" if name == "ssl_keyfile_password" else f"found {first['input']!r:.80}, "
    return f"{where}: {found}{first['msg'][0].lower()}{first['msg'][1:]}"
