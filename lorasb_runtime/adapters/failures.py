"""What an exception of fsspec or a cloud library means: missing, transient, or a lasting failure.

Looks at what exceptions carry, not at their classes, so that no cloud library is imported.
"""

from collections.abc import Iterator

from lorasb_runtime.errors import StoreError

MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
# What another attempt would meet again: no right to read, a missing cloud library, or arguments
# that the library does not take (its TypeError or ValueError). All else may pass.
LASTING = (PermissionError, ImportError, NotImplementedError, TypeError, ValueError)
STORE_GONE = ("NoSuchBucket", "RepositoryNotFoundError", "RevisionNotFoundError")
PASSING_STATUS = (408, 425, 429)


def is_missing(error: BaseException) -> bool:
    """The file is not there, although its bucket answers and is."""
    if _store_is_gone(error):
        return False
    return isinstance(error, MISSING) or http_status(error) == 404


def store_error(url: str, path: str, error: BaseException) -> StoreError:
    """The StoreError to raise for `error`; it is transient unless that cannot be."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    status = http_status(error)
    lasting = isinstance(error, LASTING) or _store_is_gone(error)
    if status is not None:
        lasting = 400 <= status < 500 and status not in PASSING_STATUS
    return StoreError(f"store {url}: {path}: {reason}", transient=not lasting)


def http_status(error: BaseException) -> int | None:
    """The HTTP status that the exception or one of its causes carries."""
    for each in _causes(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:  # aiohttp, httpx
            found = getattr(each, "status", None) or getattr(response, "status_code", None)
        if isinstance(found, int):
            return found
    return None


def _store_is_gone(error: BaseException) -> bool:
    for each in _causes(error):
        response = getattr(each, "response", None)
        code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
        if code in STORE_GONE or type(each).__name__ in STORE_GONE:
            return True
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
