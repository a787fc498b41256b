"""What a request is refused or ended for that is nobody's mistake: too many, too long, not now.

`code`, `retry_after` (whole seconds), `headers` and `outcome` go into the answer and the counts.
"""

from typing import ClassVar

from lorasb_runtime.errors import OverloadedError, ServiceError

LOADING_RETRY = 5  # seconds; how long a model takes to load is not known
DRAINING_RETRY = 1  # another server takes the next attempt


class QueueFullError(OverloadedError):
    """As many sequences run and wait as may (HTTP 429)."""

    code = "queue_full"

    def __init__(self, inside: int, count: int, most: int, retry_after: int) -> None:
        super().__init__(
            f"the queue is full: found {inside} sequences running or waiting and {count} asked "
            f"for, at most {most}; try again in {retry_after} s"
        )
        self.retry_after = retry_after


class DeadlineError(ServiceError):
    """A request took longer than it may (HTTP 504).

    One that had not begun is worth another attempt; one that had would run as long again.
    """

    code = "request_timeout"
    outcome = "timeout"

    def __init__(self, seconds: float, *, begun: bool) -> None:
        where = "while it was answered" if begun else "before it was begun"
        super().__init__(f"the request's time of {seconds:g} s ran out {where}")
        self.headers = {"x-should-retry": "false"} if begun else {}


class UnavailableError(ServiceError):
    """The server is loading or stopping (HTTP 503)."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LoadingError(UnavailableError):
    """The model is not loaded yet."""

    code = "loading"

    def __init__(self) -> None:
        super().__init__("the model is being loaded", LOADING_RETRY)


class StoppingError(UnavailableError):
    """The server stops: it takes nothing new, or ends what is still running."""

    code = "stopping"
    outcome = "shutdown"
    headers: ClassVar[dict[str, str]] = {"Connection": "close"}

    def __init__(self) -> None:
        super().__init__("the server is stopping", DRAINING_RETRY)
