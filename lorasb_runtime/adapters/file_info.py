"""What a store tells about one of its files."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class FileInfo:
    """`modified` is None where the store does not tell."""

    nbytes: int
    modified: datetime | None
