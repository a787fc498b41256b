"""What the OpenAPI document says of routes besides their types: failures, streams, file bodies."""

from typing import Any

from lorasb_server.schemas.answers import Answer, ErrorAnswer, Status

Documented = dict[int | str, dict[str, Any]]

FAILURES: dict[int | str, str] = {
    400: "A field is missing, wrong or not supported; `param` names it.",
    401: "The key is missing or not known.",
    403: "The key's role does not allow this.",
    404: "No such model, adapter or version.",
    409: "This name or version cannot be written or deleted.",
    413: "The body or the adapter is too large.",
    422: "The adapter was made for another basis.",
    429: "The queue is full or a quota used up; `Retry-After` tells the seconds to wait.",
    503: "The adapter store does not answer.",
    "default": "Any other failure.",
}
READINESS: Documented = {503: {"model": Status, "description": "Not yet."}}
EVENT: dict[str, Any] = {
    "type": "object",
    "description": "One event: `data` is a JSON object, and `[DONE]` in the last.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
PUT_FILE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "An adapter file's bytes.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def failures(*statuses: int) -> Documented:
    """The document's entries for these failures, and for any other."""
    named: list[int | str] = [*statuses, "default"]
    return {status: {"model": ErrorAnswer, "description": FAILURES[status]} for status in named}


def generated(answer: type[Answer]) -> Documented:
    """The document's entries for a route that generates: whole, or as server-sent events."""
    whole = {"model": answer, "description": "The answer; with `stream` as server-sent events."}
    return {
        200: {**whole, "content": {"text/event-stream": {"schema": EVENT}}},
        **failures(400, 401, 404, 413, 422, 429, 503),
    }
