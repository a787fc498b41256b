"""Frozen settings of the library; nothing here reads the environment."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CacheConfig:
    """KV cache: its size in bytes, and the smallest region that a sequence is given (tokens).

    Beside it the prefix cache: its size in bytes (0: none), and its blocks' length in tokens.
    """

    nbytes: int = 2 << 30
    smallest_region: int = 256
    prefix_nbytes: int = 512 << 20
    prefix_block: int = 16


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step: sequences running at once, tokens of prefill and decode together."""

    max_num_seqs: int = 64
    max_batched_tokens: int = 512


@dataclass(frozen=True)
class EngineConfig:
    """The torch engine: dtype None keeps the checkpoint's, max_model_len None the model's.

    pins: names of adapters whose last served version stays in its slot.
    """

    dtype: str | None = None
    device: str = "cpu"
    max_model_len: int | None = None
    slots: int = 1024
    pins: frozenset[str] = frozenset()
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
