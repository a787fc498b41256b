"""The one mapping from errors to HTTP: OpenAI's error object with the right status."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lorasb_runtime.errors import (
    BasisMismatchError,
    ConflictError,
    InputError,
    LorasbError,
    NotFoundError,
    OverloadedError,
    StoreError,
    TooLargeError,
)
from lorasb_server.refusals import DeadlineError, UnavailableError
from lorasb_server.tenants.errors import ForbiddenError, InvalidKeyError

logger = logging.getLogger(__name__)

# Most special first.
STATUS: tuple[tuple[type[LorasbError], int], ...] = (
    (BasisMismatchError, 422),
    (InvalidKeyError, 401),
    (ForbiddenError, 403),
    (NotFoundError, 404),
    (TooLargeError, 413),
    (ConflictError, 409),
    (InputError, 400),
    (StoreError, 503),
    (UnavailableError, 503),
    (DeadlineError, 504),
    (OverloadedError, 429),
    (LorasbError, 500),
)
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}
RETRY_SECONDS = 1
UNION_TAGS = (
    "<text>",
    "<list>",
    "<texts>",
    "<tokens>",
    "<token lists>",
    "<object>",
    "<message>",
    "<text message>",
    "<assistant>",
    "<tool>",
)  # no part of a field


class FieldError(InputError):
    """A request field that is wrong or not supported; `param` names it, as OpenAI does."""

    def __init__(self, param: str | None, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelNotFoundError(NotFoundError):
    """`model` or `adapter` names nothing that is here."""

    def __init__(self, param: str, name: str) -> None:
        super().__init__(f"The model {name[:200]!r} does not exist")
        self.param = param
        self.code = "model_not_found"


class InlineTooLargeError(TooLargeError):
    """The inline adapter has more bytes than one of this basis can have."""

    param = "adapter.inline"


class InlineBasisError(BasisMismatchError):
    """The inline adapter was made for another basis."""

    param = "adapter.inline"


def status_of(error: LorasbError) -> int:
    return next(status for kind, status in STATUS if isinstance(error, kind))


def outcome_of(error: BaseException) -> str:
    """What an answer that ends with this error is counted as."""
    named: str | None = getattr(error, "outcome", None)
    if named is not None:
        return named
    return "refused" if isinstance(error, LorasbError) and status_of(error) < 500 else "error"


def error_body(error: LorasbError) -> dict[str, Any]:
    """OpenAI's error object for one of our errors."""
    param = getattr(error, "param", None)
    code = getattr(error, "code", None)
    return _body(status_of(error), str(error), param, code)


def error_response(error: LorasbError) -> JSONResponse:
    """The whole answer for one of our errors."""
    status = status_of(error)
    headers = dict(getattr(error, "headers", {}))
    retry_after = getattr(error, "retry_after", RETRY_SECONDS if status == 429 else None)
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status, headers)


def internal_body() -> dict[str, Any]:
    return _body(500, "internal error", None, None)


def install_handlers(app: FastAPI) -> None:
    """Make every error of the application leave in OpenAI's shape."""

    @app.exception_handler(LorasbError)
    async def ours(request: Request, error: LorasbError) -> JSONResponse:
        expected = isinstance(error, DeadlineError | UnavailableError)
        if status_of(error) >= 500 and not expected:
            logger.error("%s %s: %s", request.method, request.url.path, error)
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        param, message = _describe(error.errors()[0])
        return JSONResponse(_body(400, message, param, None), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return JSONResponse(
            _body(error.status_code, message, None, None), error.status_code, error.headers
        )


def _body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _describe(error: Any) -> tuple[str | None, str]:
    """The field and the sentence for one of pydantic's complaints."""
    *inner, last = [str(part) for part in error["loc"][1:]] or [""]
    unknown = error["type"] == "extra_forbidden"  # then `last` is the caller's own word
    where = [part for part in inner if part not in UNION_TAGS]
    where += [last] if unknown or last not in UNION_TAGS else []
    if error["type"] == "json_invalid":
        return None, f"the body is not valid JSON: {error.get('ctx', {}).get('error', '')}"
    param = ".".join(where) or None
    if unknown or error["type"] == "none_required":
        return param, f"{param}: this field is not supported"
    if error["type"] == "missing":
        return param, f"{param or 'body'}: this field is required"
    found = "" if "input" not in error else f" (found {error['input']!r:.80})"
    return param, f"{param or 'body'}: {error['msg']}{found}"
