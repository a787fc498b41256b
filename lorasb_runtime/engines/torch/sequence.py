"""The engine's side of one completion of one request. Pure Python."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorasb_runtime.engines.base import SamplingParams, TokenLogprob
from lorasb_runtime.engines.torch.kv_regions import Region

if TYPE_CHECKING:
    from lorasb_runtime.adapters.loaded_adapter import LoadedAdapter
    from lorasb_runtime.engines.torch.structured import GrammarMatcher


@dataclass(eq=False)
class Sequence:
    """Tokens so far, how many of them are in the KV cache, and what the sequence holds.

    `slot` is the leased adapter slot (0: base model, None: no lease yet); `region` the part of
    the KV cache that is its own. Both are None while it waits. `digests` name its whole KV
    blocks; `cached` counts the tokens that its first prefill found in the prefix cache, `kept` says
    that its prompt's blocks were offered to that cache. `matcher` follows the grammar, if any;
    `prompt_logprobs` holds what is asked for of the prompt, as far as it is computed. `posted` is
    when the request came, `waited` how long after that its first step began, in seconds.
    """

    request_id: str
    index: int
    tokens: list[int]
    prompt_length: int
    limit: int
    sampling: SamplingParams
    seed: int
    adapter: "LoadedAdapter | None" = None
    tenant: str = ""
    computed: int = 0
    region: Region | None = None
    slot: int | None = None
    arrival: int = 0
    digests: list[bytes] = field(default_factory=list)
    cached: int | None = None
    kept: bool = False
    matcher: "GrammarMatcher | None" = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    posted: float = 0.0
    waited: float | None = None

    @property
    def owner(self) -> str:
        """Tenant and adapter version: who may share KV, and who takes turns with whom."""
        version = self.adapter.version if self.adapter else ""
        return f"{self.tenant}\0{version}"

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def wants_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still to be computed."""
        asked = self.sampling.prompt_logprobs is not None and self.index == 0
        return asked and len(self.prompt_logprobs) < self.prompt_length - 1

    @property
    def remaining(self) -> int:
        """Tokens that are not in the KV cache yet: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.computed
