"""What the plugin is told, by environment variables, as vLLM's processes hand them on.

Knows neither vllm nor torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasb_runtime.errors import InputError

BASIS = "LORASB_BASIS"
STORE = "LORASB_ADAPTERS"
REFRESH = "LORASB_REFRESH"


@dataclass(frozen=True)
class PluginSettings:
    """basis: the basis file. store: URL of the adapter store that vLLM's own server reads.

    refresh: seconds after which a change in the store is seen at the latest.
    """

    basis: Path
    store: str | None = None
    refresh: float = 1.0

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "PluginSettings | None":
        """None where nothing is configured. Raises InputError for half a configuration."""
        basis, store = environment.get(BASIS), environment.get(STORE)
        refresh = environment.get(REFRESH)
        if not basis:
            for name, value in ((STORE, store), (REFRESH, refresh)):
                if value:
                    raise InputError(f"{name}: found {value!r} without {BASIS}, the basis file")
            return None
        try:
            seconds = float(refresh) if refresh else 1.0
        except ValueError:
            seconds = -1.0
        if not 0.0 <= seconds < float("inf"):
            raise InputError(f"{REFRESH}: found {refresh!r}, expected seconds, 0 or more")
        return cls(Path(basis).absolute(), store or None, seconds)

    def as_environment(self) -> dict[str, str]:
        """The variables that `read` reads this from."""
        values = {BASIS: str(self.basis), REFRESH: str(self.refresh)}
        if self.store is not None:
            values[STORE] = self.store
        return values
