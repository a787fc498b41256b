"""What the store has said of names: their current version, or that it does not have them."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from lorasb_runtime.adapters.names import AdapterName

STRIPES = 1024  # names share change counters by hash, so that these take no more room


@dataclass(frozen=True)
class KnownVersion:
    """`asked`: when the store was, on the clock. late: it has failed to confirm it since."""

    version: str
    asked: float
    late: bool = False


class CurrentVersions:
    """Fresh for `refresh` seconds after the store was asked, usable for `stale` seconds.

    Keeps the `limit` names asked for last, and as many unknown ones, apart, so that made-up names
    push no real one out. Safe for many threads.
    """

    def __init__(
        self, clock: Callable[[], float], refresh: float, stale: float, limit: int
    ) -> None:
        self._clock = clock
        self._refresh = refresh
        self._stale = stale
        self._limit = limit
        self._lock = threading.Lock()
        self._known: OrderedDict[AdapterName, KnownVersion] = OrderedDict()
        self._unknown: OrderedDict[AdapterName, float] = OrderedDict()  # when asked
        self._names: Counter[str] = Counter()  # known names by their version
        self._changes = [0] * STRIPES

    def fresh(self, name: AdapterName) -> KnownVersion | None:
        """What holds without asking the store."""
        return self._within(name, self._refresh)

    def usable(self, name: AdapterName) -> KnownVersion | None:
        """What may be served while the store does not answer."""
        return self._within(name, self._stale)

    def is_unknown(self, name: AdapterName) -> bool:
        """The store has just said that it does not have the name."""
        with self._lock:
            asked = self._unknown.get(name)
            return asked is not None and self._clock() - asked < self._refresh

    def ask(self, name: AdapterName) -> tuple[float, int]:
        """To be taken before asking the store, and given to `learn` with the answer."""
        with self._lock:
            return self._clock(), self._changes[hash(name) % STRIPES]

    def learn(self, name: AdapterName, version: str | None, asked: tuple[float, int]) -> str | None:
        """Take in the store's answer, unless a change was made here after the question.

        Returns the version that no name has any more because of this, if there is one.
        """
        at, changes = asked
        with self._lock:
            if changes != self._changes[hash(name) % STRIPES]:
                return None
            return self._keep(name, version, at)

    def change(self, name: AdapterName, version: str | None) -> str | None:
        """Take in a change that was made here: `version` is current from now on.

        Returns what `learn` does.
        """
        with self._lock:
            self._changes[hash(name) % STRIPES] += 1
            return self._keep(name, version, self._clock())

    def doubt(self, name: AdapterName) -> None:
        """A change failed half-way: ask the store next time, use what is known if it is down."""
        with self._lock:
            self._changes[hash(name) % STRIPES] += 1
            self._unknown.pop(name, None)
            known = self._known.get(name)
            if known is not None:
                asked = min(known.asked, self._clock() - self._refresh)
                self._known[name] = replace(known, asked=asked)

    def mark_late(self, name: AdapterName) -> None:
        """The store has not confirmed the name in time; `learn` lifts the mark."""
        with self._lock:
            known = self._known.get(name)
            if known is not None:
                self._known[name] = replace(known, late=True)

    def _within(self, name: AdapterName, seconds: float) -> KnownVersion | None:
        with self._lock:
            known = self._known.get(name)
            if known is None or self._clock() - known.asked >= seconds:
                return None
            return known

    def _keep(self, name: AdapterName, version: str | None, asked: float) -> str | None:
        before = self._known.pop(name, None)
        self._unknown.pop(name, None)
        if version is not None:
            self._known[name] = KnownVersion(version, asked)
            self._names[version] += 1
        else:
            self._unknown[name] = asked
        if len(self._unknown) > self._limit:
            self._unknown.popitem(last=False)
        if len(self._known) > self._limit:
            self._leave(self._known.popitem(last=False)[1].version)
        return before.version if before is not None and self._leave(before.version) else None

    def _leave(self, version: str) -> bool:
        """One name less has the version; whether that was the last."""
        self._names[version] -= 1
        if self._names[version]:
            return False
        del self._names[version]
        return True
