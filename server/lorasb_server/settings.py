"""The server's own settings, frozen."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerConfig:
    """`model_name` is the base model's id; `model_aliases` are other names it answers to.

    created: Unix time shown for the models. max_request_bytes bounds JSON bodies (where an inline
    adapter needs more, that is allowed), max_n the completions of one prompt, blend_cache_bytes
    and _count the blends and inline adapters that are kept in host memory.
    """

    model_name: str
    model_aliases: tuple[str, ...] = ()
    created: int = 0
    max_request_bytes: int = 16 << 20
    max_n: int = 128
    blend_cache_bytes: int = 256 << 20
    blend_cache_count: int = 4096

    def is_base(self, name: str) -> bool:
        return name == self.model_name or name in self.model_aliases
