"""Named errors, drawn as a tree; callers map them once to an exit status or an HTTP status.

LorasbError
├── InputError                 the caller's to mend: exit 2, HTTP 400
│   ├── FileFormatError        a file is not what it must be
│   │   └── DigestError        its bytes are not those that its name promises
│   ├── BasisMismatchError     adapter, basis and model do not belong together (HTTP 422)
│   ├── NotFoundError          no such model, adapter or version (HTTP 404)
│   ├── TooLargeError          over a stated limit (HTTP 413)
│   └── ConflictError          the target exists or cannot be written (HTTP 409)
└── ServiceError               ours or the surroundings': exit 1, HTTP 500
    ├── StoreError             the adapter store did not answer (HTTP 503)
    ├── OverloadedError        the queue is full, try again later (HTTP 429)
    ├── VerificationError      a merged model is not what it must be
    └── EngineError            the engine failed or stopped
"""


class LorasbError(Exception):
    """Base of every error that lorasb raises on purpose; its text is one line for a person."""


class InputError(LorasbError):
    """Input that the caller can mend."""


class FileFormatError(InputError):
    """A file's content is not what it must be: names the file, what was found and expected."""

    def __init__(self, source: str, found: str, expected: str) -> None:
        super().__init__(f"{source}: found {found}, expected {expected}")
        self.source = source
        self.found = found
        self.expected = expected


class DigestError(FileFormatError):
    """A file's bytes do not have the digest that names them: damaged, or cut short on the way."""


class BasisMismatchError(InputError):
    """An adapter was made for another basis, or a basis for another model."""


class NotFoundError(InputError):
    """A model, adapter or adapter version that does not exist."""


class TooLargeError(InputError):
    """Something exceeds a stated limit."""


class ConflictError(InputError):
    """The target already exists or may not be written."""


class ServiceError(LorasbError):
    """A failure that the caller did not cause."""


class StoreError(ServiceError):
    """The adapter store failed to answer; `transient` means that another attempt may succeed."""

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class OverloadedError(ServiceError):
    """There is no room for another request now."""


class EngineError(ServiceError):
    """The engine failed or is stopped."""


class VerificationError(ServiceError):
    """A merged model was read back and is not the base model plus adapters."""
