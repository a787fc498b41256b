"""The server's log on stderr: lines for people, or JSON objects, each with the request it is about.

What a request says must not get here. So of an exception that is told while a request is answered,
or that another library tells, only types and places are written, not its text.
"""

import json
import logging
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

REQUEST_ID: ContextVar[str | None] = ContextVar("lorasb_request_id", default=None)
OURS = ("lorasb_runtime", "lorasb_server", "lorasb_tools")


def set_up_logs(log_format: str, level: str) -> None:
    """Write all log lines of this process to stderr; `level` is that of lorasb's own.

    Other libraries' debug lines are never written, nor that uvicorn starts and ends.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.basicConfig(handlers=[handler], level=max(logging.INFO, _number(level)), force=True)
    logging.captureWarnings(True)
    for name in OURS:
        logging.getLogger(name).setLevel(_number(level))
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, _number(level)))


class TextLines(logging.Formatter):
    """`INFO lorasb_server.requests: ... [request id]`."""

    def format(self, record: logging.LogRecord) -> str:
        request = REQUEST_ID.get()
        about = f" [{request}]" if request else ""
        line = f"{record.levelname} {record.name}: {_message(record)}{about}"
        failure = _failure(record)
        return f"{line}\n{failure}" if failure else line


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, request_id, and the record's facts."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        if request := REQUEST_ID.get():
            line["request_id"] = request
        line |= getattr(record, "facts", {})
        if failure := _failure(record):
            line["exception"] = failure
        return json.dumps(line, ensure_ascii=False)


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


def _ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in OURS


def _message(record: logging.LogRecord) -> str:
    """The message; of others' only the first line, after which they quote what they worked on."""
    message = record.getMessage()
    return message if _ours(record) else message.partition("\n")[0]


def _failure(record: logging.LogRecord) -> str:
    """The record's exception, empty where it has none."""
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    error: BaseException | None = record.exc_info[1]
    if _ours(record) and REQUEST_ID.get() is None:
        return "".join(traceback.format_exception(error)).rstrip()
    told = []
    while error is not None:
        told.append("".join(traceback.format_tb(error.__traceback__)) + type(error).__qualname__)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join(reversed(told))
