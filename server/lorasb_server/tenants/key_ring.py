"""The keys that a running server accepts, kept up with their file."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

from lorasb_runtime.errors import LorasbError
from lorasb_server.tenants.api_key import ApiKey, new_key, split_key, utc_now
from lorasb_server.tenants.caller import Caller, Role
from lorasb_server.tenants.errors import InvalidKeyError
from lorasb_server.tenants.keys_file import Keys, load_keys

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 1.0
Stamp = tuple[int, int, int] | None  # inode, time and size of a file


class KeyRing:
    """Recognises callers by their keys. Safe to use while another thread runs `reload`."""

    def __init__(self, path: Path, *, now: Callable[[], datetime] = utc_now) -> None:
        """Raises NotFoundError, FileFormatError or InputError where the file cannot be used."""
        self._path = path
        self._now = now
        self._nobody, _ = new_key("nobody", Role.INFER)
        self._stamp = self._look()
        self._complaint = ""
        self._take(load_keys(path))

    def identify(self, authorization: str | None) -> Caller:
        """The caller whose key an Authorization header bears. Raises InvalidKeyError."""
        if not authorization:
            raise InvalidKeyError("no API key: expected a header 'Authorization: Bearer <key>'")
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise InvalidKeyError("Authorization header: expected 'Bearer <key>'")
        keys, by_id = self._current
        key_id, secret = split_key(text.strip())
        record = by_id.get(key_id, self._nobody)
        # An unknown id takes the time of a known one, and nobody's secret is known to no one.
        if not record.matches(secret):
            raise InvalidKeyError("Incorrect API key provided")
        if record.expired(self._now()):
            raise InvalidKeyError(f"API key {record.id} has expired")
        shared = frozenset(keys.shared)
        return Caller(record.tenant, record.role, shared, keys.quota(record.tenant))

    def reload(self) -> None:
        """Take up a changed file; one that cannot be used is logged, and the old keys stay."""
        stamp = self._look()
        if stamp == self._stamp:
            return
        try:
            self._take(load_keys(self._path))
        except LorasbError as error:
            if str(error) != self._complaint:  # it is tried again every second
                logger.error("the API keys stay as they were: %s", error)
            self._complaint = str(error)
        else:
            self._stamp, self._complaint = stamp, ""
            logger.info("%d API keys read from %s", len(self._current[0].keys), self._path)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Keeps up with the file while the block runs."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await asyncio.to_thread(self.reload)
            except Exception:  # whatever it was, the next revocation must still be seen
                logger.exception("the API keys stay as they were")

    def _take(self, keys: Keys) -> None:
        by_id: dict[str, ApiKey] = {key.id: key for key in keys.keys}
        self._current = (keys, by_id)

    def _look(self) -> Stamp:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_ino, found.st_ctime_ns, found.st_size
