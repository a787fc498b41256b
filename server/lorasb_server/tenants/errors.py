"""What a caller is refused for. `code` and `retry_after` go into the HTTP answer."""

from lorasb_runtime.errors import InputError, NotFoundError, OverloadedError


class InvalidKeyError(InputError):
    """No API key, or one that is unknown, wrong or expired (HTTP 401)."""

    code = "invalid_api_key"


class ForbiddenError(InputError):
    """A valid key whose role does not reach this far (HTTP 403)."""

    code = "insufficient_permissions"


class AdapterNotFoundError(NotFoundError):
    """No such adapter for this caller: it is missing or another tenant's, the answer is one."""

    code = "adapter_not_found"

    def __init__(self, text: str) -> None:
        super().__init__(f"The adapter {text[:200]!r} does not exist")


class QuotaError(OverloadedError):
    """A tenant's quota is used up (HTTP 429); `retry_after`: whole seconds until it is worth it."""

    def __init__(self, message: str, retry_after: int, code: str) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.code = code
