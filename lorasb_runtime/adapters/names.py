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


def parse_name(text: str, namespace: str = DEFAULT_NAMESPACE) -> AdapterName:
    """Check and split a name; one without a namespace is in `namespace`.

    Raises InputError, naming what was found and what is allowed.
    """
    given, slash, name = text.rpartition("/")
    namespace = given if slash else namespace
    for part in (namespace, name):
        if not _is_part(part):
            raise InputError(
                f"adapter name: found {text[:140]!r}, expected [A-Za-z0-9._-]{{1,64}} with at "
                f"most one '/' (namespace/name), no '..', and none of {', '.join(RESERVED)}"
            )
    return AdapterName(namespace, name)


def parse_namespace(text: str) -> str:
    """Check a namespace, which is also a tenant's name. Raises InputError."""
    if not _is_part(text):
        raise InputError(
            f"namespace: found {text[:80]!r}, expected [A-Za-z0-9._-]{{1,64}}, no '..', and none "
            f"of {', '.join(RESERVED)}"
        )
    return text


def _is_part(text: str) -> bool:
    whole = _PART.fullmatch(text) is not None
    return whole and set(text) != {"."} and ".." not in text and text not in RESERVED
