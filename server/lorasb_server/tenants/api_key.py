"""One API key: `lsb-<id>-<secret>`, of which only a salted hash of the secret is stored."""

import hashlib
import hmac
import secrets
from datetime import UTC, datetime
from typing import Annotated

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
)

from lorasb_runtime.adapters.names import parse_namespace
from lorasb_runtime.errors import InputError
from lorasb_server.tenants.caller import Role

PREFIX = "lsb"
ID_BYTES = 6
SALT_BYTES = 16
SECRET_BYTES = 32


def _namespace(text: str) -> str:
    try:
        return parse_namespace(text)
    except InputError as error:
        raise ValueError(str(error)) from None


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected printable characters")
    return text


Namespace = Annotated[str, AfterValidator(_namespace)]
Label = Annotated[str, Field(max_length=100), AfterValidator(_printable)]


def _hex(nbytes: int) -> str:
    return f"^[0-9a-f]{{{2 * nbytes}}}$"


class ApiKey(BaseModel):
    """A key's record, by which it is recognised and from which it cannot be made.

    One SHA-256 is enough: a secret of 256 random bits cannot be guessed however fast the hash.
    Slow hashes protect what people choose.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str = Field(pattern=_hex(ID_BYTES))
    tenant: Namespace
    role: Role
    salt: str = Field(pattern=_hex(SALT_BYTES))
    hash: str = Field(pattern=_hex(hashlib.sha256().digest_size))
    created: AwareDatetime
    expires: AwareDatetime | None = None
    label: Label | None = None

    def matches(self, secret: str) -> bool:
        """Whether it is this key's secret, in a time that does not tell how much of it is."""
        return hmac.compare_digest(self.hash, digest(self.salt, secret))

    def expired(self, now: datetime) -> bool:
        return self.expires is not None and self.expires <= now


def utc_now() -> datetime:
    return datetime.now(UTC)


def digest(salt: str, secret: str) -> str:
    """The salted hash of a secret, in hex."""
    return hashlib.sha256(bytes.fromhex(salt) + secret.encode()).hexdigest()


def new_key(
    tenant: str, role: Role, *, expires: datetime | None = None, label: str | None = None
) -> tuple[ApiKey, str]:
    """A random key's record, and the key itself, which exists nowhere else.

    Raises InputError for a tenant or label that cannot be.
    """
    salt, secret = secrets.token_hex(SALT_BYTES), secrets.token_hex(SECRET_BYTES)
    try:
        record = ApiKey(
            id=secrets.token_hex(ID_BYTES),
            tenant=tenant,
            role=role,
            salt=salt,
            hash=digest(salt, secret),
            created=utc_now().replace(microsecond=0),
            expires=expires,
            label=label,
        )
    except ValidationError as error:
        first = error.errors()[0]
        found = f"found {first['input']!r:.120}"
        raise InputError(f"{first['loc'][0]}: {found}; {first['msg']}") from None
    return record, f"{PREFIX}-{record.id}-{secret}"


def split_key(text: str) -> tuple[str, str]:
    """(id, secret) of a key as its owner sends it; empty where it is no key."""
    prefix, _, rest = text.partition("-")
    key_id, _, secret = rest.partition("-")
    return (key_id, secret) if prefix == PREFIX else ("", "")
