"""The keys file: API keys, the tenants' quotas and the shared namespaces, as one JSON object."""

import fcntl
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from lorasb_runtime.errors import ConflictError, FileFormatError, InputError, NotFoundError
from lorasb_runtime.storage import atomic
from lorasb_server.tenants.api_key import ApiKey, Namespace
from lorasb_server.tenants.quota import Quota

MODE = 0o600
SHOWABLE = ("role", "tenant", "format", "format_version")  # the rest may be a misplaced secret


class Keys(BaseModel):
    """A keys file's content; a change gives a new one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["lorasb-keys"]
    format_version: Literal["1"]
    keys: tuple[ApiKey, ...] = ()
    tenants: dict[Namespace, Quota] = {}
    shared: tuple[Namespace, ...] = ()

    @field_validator("keys")
    @classmethod
    def _distinct(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        twice = [key for key, count in Counter(k.id for k in keys).items() if count > 1]
        if twice:
            raise ValueError(f"expected distinct ids, found {twice[0]!r} twice")
        return keys

    def quota(self, tenant: str) -> Quota:
        return self.tenants.get(tenant, Quota())

    def with_key(self, key: ApiKey) -> "Keys":
        """Raises ConflictError where the id is taken."""
        if any(k.id == key.id for k in self.keys):
            raise ConflictError(f"key {key.id}: this id is taken")
        return self.model_copy(update={"keys": (*self.keys, key)})

    def without_key(self, key_id: str) -> "Keys":
        """Raises NotFoundError where there is no such key."""
        left = tuple(key for key in self.keys if key.id != key_id)
        if len(left) == len(self.keys):
            raise NotFoundError(f"key id: found none like {_id_only(key_id)!r}")
        return self.model_copy(update={"keys": left})

    def with_quota(self, tenant: str, quota: Quota) -> "Keys":
        return self.model_copy(update={"tenants": {**self.tenants, tenant: quota}})

    def with_shared(self, namespace: str) -> "Keys":
        return self.model_copy(
            update={"shared": tuple(sorted({*self.shared, namespace}))},
        )

    def without_shared(self, namespace: str) -> "Keys":
        """Raises NotFoundError where it is not shared."""
        if namespace not in self.shared:
            raise NotFoundError(f"namespace {namespace!r} is not shared")
        return self.model_copy(
            update={"shared": tuple(n for n in self.shared if n != namespace)},
        )


def no_keys() -> Keys:
    """What an empty file would hold."""
    return Keys(format="lorasb-keys", format_version="1")


def parse_keys(data: bytes, source: str) -> Keys:
    """Raises FileFormatError, which shows nothing that may be secret."""
    try:
        return Keys.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        found = f"{_shown(first)}, {first['msg'][:1].lower()}{first['msg'][1:]}"
        raise FileFormatError(source, found, "a file that `lorasb keys` wrote") from None


def load_keys(path: Path) -> Keys:
    """Read a keys file. Raises NotFoundError, FileFormatError, InputError."""
    return parse_keys(_read(path), str(path))


def edit_keys(path: Path, change: Callable[[Keys], Keys], *, create: bool = False) -> Keys:
    """Replace the file by `change` of its content, one edit after the other.

    With `create` a missing file is an empty one. The file is for its owner's eyes alone.
    """
    path = path.resolve()  # a symbolic link stays one
    with _locked(path):
        old = no_keys() if create and not path.exists() else load_keys(path)
        new = change(old)
        data = new.model_dump_json(indent=2, exclude_none=True).encode() + b"\n"
        parse_keys(data, str(path))
        atomic.write_bytes(path, data, mode=MODE)
    return new


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"keys file {path}: not found") from None
    except OSError as error:
        raise InputError(f"keys file {path}: {error.strerror}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the editors: by a lock on the folder, as the file itself is replaced."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"keys file {path}: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _shown(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the whole"
    if error["loc"] and error["loc"][-1] in SHOWABLE and error["type"] != "extra_forbidden":
        return f"{where} = {error['input']!r:.80}"
    return where


def _id_only(text: str) -> str:
    """What may be shown of a key id, which someone may have mistaken for the key."""
    return text if len(text) <= 20 else text[:4] + "..."
