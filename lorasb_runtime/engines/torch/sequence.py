"""The engine's side of one completion of one request. Pure Python."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasb_runtime.engines.base import SamplingParams
from lorasb_runtime.engines.torch.kv_regions import Region

if TYPE_CHECKING:
    from lorasb_runtime.adapters.loader import LoadedAdapter


@dataclass(eq=False)
class Sequence:
    """Tokens so far, how many of them are in the KV cache, and what the sequence holds.

    `slot` is the leased adapter slot (0: base model, None: no lease yet); `region` the part of
    the KV cache that is its own. Both are None while it waits.
    """

    request_id: str
    index: int
    tokens: list[int]
    prompt_length: int
    limit: int
    sampling: SamplingParams
    seed: int
    adapter: "LoadedAdapter | None" = None
    computed: int = 0
    region: Region | None = None
    slot: int | None = None
    arrival: int = 0

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Tokens that are not in the KV cache yet: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.computed
