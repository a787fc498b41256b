"""Reads JSON objects from files that someone else may have written."""

import json
import stat
from pathlib import Path
from typing import Any

from lorasb_runtime.errors import FileFormatError, NotFoundError, TooLargeError

MAX_BYTES = 64 << 20


def read_json_object(path: Path, what: str = "a folder with it") -> dict[str, Any]:
    """The JSON object in a file; `what` says what was expected where there is no such file.

    Raises NotFoundError, TooLargeError over MAX_BYTES, FileFormatError for anything else than one
    JSON object in a regular file.
    """
    check_regular(path, what)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise TooLargeError(f"{path}: found {size:,} bytes of JSON, expected at most {MAX_BYTES:,}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FileFormatError(str(path), f"no JSON ({reason})", "a JSON object") from None
    if not isinstance(value, dict):
        raise FileFormatError(str(path), "another kind of JSON", "a JSON object")
    return value


def check_regular(path: Path, what: str) -> None:
    """Raise unless `path` is a regular file or a link to one: reading another kind may not end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file; expected {what}") from None
    except OSError as error:
        raise FileFormatError(str(path), f"no file ({error.strerror})", "a regular file") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise FileFormatError(str(path), kind, "a regular file")
