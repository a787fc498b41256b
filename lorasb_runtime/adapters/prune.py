"""Removes old adapter versions and the leftovers of killed writers; never a current version."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from lorasb_runtime.adapters.files import FileInfo
from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.adapters.store import SUFFIX, AdapterStore, StoredVersion, versions_among
from lorasb_runtime.errors import FileFormatError, NotFoundError

LEFTOVER_SECONDS = 3600.0  # no publishing takes that long
_ASIDE = re.compile(r"\..+\.tmp")


@dataclass(frozen=True)
class PruneConfig:
    """keep: versions of each adapter to keep besides the current one, the newest.

    older_than: seconds; younger versions stay, however many there are.
    """

    keep: int
    older_than: float = 0.0
    leftover_seconds: float = LEFTOVER_SECONDS
    dry_run: bool = False


@dataclass(frozen=True)
class PruneReport:
    """What was removed (or would be); `problems` are adapters left alone, one line each."""

    versions: tuple[StoredVersion, ...]
    leftovers: tuple[str, ...]
    problems: tuple[str, ...]


def prune(
    store: AdapterStore,
    config: PruneConfig,
    names: list[AdapterName] | None = None,
    *,
    now: Callable[[], float] = time.time,
) -> PruneReport:
    """Prune the named adapters, or all. Raises NotFoundError for a name without any file.

    Versions of an adapter that has no `current` are leftovers too: a first publishing that was
    killed, or a deletion. An adapter whose `current` cannot be read is left alone.
    """
    store.files.need_writable()
    versions: list[StoredVersion] = []
    leftovers: list[str] = []
    problems: list[str] = []
    for name, files in _folders(store, names).items():
        old = [file for file, info in files.items() if _is_old(info, now, config.leftover_seconds)]
        aside = [f"{store.folder(name)}/{file}" for file in old if _ASIDE.fullmatch(file)]
        try:
            current = store.current(name)
        except NotFoundError:
            doomed = [v for v in versions_among(files, name, None) if _file(v) in old]
        except FileFormatError as error:
            problems.append(str(error))
            continue
        else:
            others = [v for v in versions_among(files, name, current) if not v.current]
            doomed = [v for v in others[config.keep :] if _age(v, now) >= config.older_than]
        if not config.dry_run:
            for path in aside:
                store.files.remove(path)
            doomed = [v for v in doomed if _remove(store, v)]
        versions += doomed
        leftovers += aside
    return PruneReport(tuple(versions), tuple(leftovers), tuple(problems))


def _folders(
    store: AdapterStore, names: list[AdapterName] | None
) -> dict[AdapterName, dict[str, FileInfo]]:
    if names is None:
        return store.listing()
    folders = {name: store.files_of(name) for name in names}
    for name, files in folders.items():
        if not files:
            raise NotFoundError(f"adapter {str(name)!r} not found in the store {store.url}")
    return folders


def _remove(store: AdapterStore, version: StoredVersion) -> bool:
    try:
        return store.remove_version(version.name, version.version)
    except NotFoundError:  # somebody else was faster
        return False


def _file(version: StoredVersion) -> str:
    return f"{version.version}{SUFFIX}"


def _age(version: StoredVersion, now: Callable[[], float]) -> float:
    return now() - version.modified.timestamp() if version.modified else 0.0


def _is_old(info: FileInfo, now: Callable[[], float], seconds: float) -> bool:
    return info.modified is not None and now() - info.modified.timestamp() >= seconds
