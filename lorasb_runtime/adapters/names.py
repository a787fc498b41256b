"""Adapter names: `name` or `namespace/name`; without a namespace it is `default`."""

import re
from dataclasses import dataclass

from lorasb_runtime.errors import InputError

DEFAULT_NAMESPACE = "default"
RESERVED = ("versions", "rollback")
_PART = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, order=True)
class AdapterName:
    """A checked name; prints as users write it."""

    namespace: str
    name: str

    def __str__(self) -> str:
        if self.namespace == DEFAULT_NAMESPACE:
            return self.name
        return f"{self.namespace}/{self.name}"


def parse_name(text: str) -> AdapterName:
    """Check and split a name. Raises InputError, naming what was found and what is allowed."""
    namespace, slash, name = text.rpartition("/")
    if not slash:
        namespace = DEFAULT_NAMESPACE
    for part in (namespace, name):
        if not _PART.fullmatch(part) or set(part) == {"."} or ".." in part or part in RESERVED:
            raise InputError(
                f"adapter name: found {text[:140]!r}, expected [A-Za-z0-9._-]{{1,64}} with at "
                f"most one '/' (namespace/name), no '..', and none of {', '.join(RESERVED)}"
            )
    return AdapterName(namespace, name)
