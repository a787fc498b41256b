"""What the application and the listener are built from, frozen."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServerConfig:
    """`model_name` is the base model's id; `model_aliases` are other names it answers to.

    created: Unix time shown for the models. max_request_bytes bounds JSON bodies (where an inline
    adapter needs more, that is allowed), max_n the completions of one prompt, blend_cache_bytes
    and _count the blends and inline adapters that are kept in host memory. max_queue: sequences
    that may wait beside those that run; request_timeout: seconds that a request may take, None for
    any.
    """

    model_name: str
    model_aliases: tuple[str, ...] = ()
    created: int = 0
    max_request_bytes: int = 16 << 20
    max_n: int = 128
    blend_cache_bytes: int = 256 << 20
    blend_cache_count: int = 4096
    max_queue: int = 1024
    request_timeout: float | None = None

    def is_base(self, name: str) -> bool:
        return name == self.model_name or name in self.model_aliases


@dataclass(frozen=True)
class Tls:
    """Files in PEM; clients must show a certificate signed by one of `ca_certs`, if it is given.

    keyfile None: the key is in `certfile`.
    """

    certfile: Path
    keyfile: Path | None = None
    keyfile_password: str | None = None
    ca_certs: Path | None = None


@dataclass(frozen=True)
class ListenConfig:
    """Where to listen (port 0: a free one), and how long a stop waits for requests, in seconds.

    cors_origins: whose pages may call from a browser; root_path: where a proxy has the server.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    drain_timeout: float = 20.0
    tls: Tls | None = None
    cors_origins: tuple[str, ...] = ()
    root_path: str = ""
