"""Every setting of `lorasb serve`, declared once.

`max_queue` here is the flag `--max-queue`, the variable `LORASB_MAX_QUEUE` and the key `max-queue`
of the settings file. The docstring of `sources` tells which of them wins.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, FiniteFloat, SecretStr, StringConstraints
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "LORASB_"


def _setting(group: str, default: Any, text: str, **bounds: Any) -> Any:
    """A field: the heading that its flag is listed under, its default, its help, pydantic's bounds.

    A default of None means that it is not set.
    """
    return Field(default, description=text, json_schema_extra={"group": group}, **bounds)


def _split(value: object) -> object:
    """A variable has one text: its entries are separated by commas, or it is a list in JSON."""
    if not isinstance(value, str):
        return value
    if value.startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError("expected a list in JSON") from None
    return [part.strip() for part in value.split(",")]


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Origin = Annotated[str, StringConstraints(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$")]
Origins = Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(_split)]

MODEL, LISTEN, ADAPTERS = "What is served", "Listening", "Adapters"
ENGINE, LOAD, WATCH = "Engine", "Under load", "Watching"


class Settings(BaseSettings):
    """All settings, checked each by itself; `checks` has what they must be together."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True
    )

    model: str | None = _setting(MODEL, None, "Hugging Face id or local folder.")
    basis: Path | None = _setting(MODEL, None, "Basis file that all adapters share.")
    adapters: str | None = _setting(MODEL, None, "Adapter store: a folder or fsspec URL.")
    pack: Path | None = _setting(
        MODEL, None, "Pack file: read adapters from it where it has the store's version of them."
    )
    merged: str | None = _setting(
        MODEL, None, "Fold this adapter into the weights at start and serve that model alone."
    )
    served_model_name: str | None = _setting(
        MODEL, None, "Name of the base model; by default the id, or the folder's own name."
    )
    config: Path | None = _setting(
        MODEL, None, "Settings file in TOML; flags and variables win over it."
    )

    host: str = _setting(LISTEN, "127.0.0.1", "Address to listen on.")
    port: int = _setting(LISTEN, 8000, "Port to listen on; 0 chooses one.", ge=0, le=65535)
    allow_open: bool = _setting(
        LISTEN,
        False,
        "Listen beyond loopback although anyone who reaches the port may do anything.",
    )
    api_keys: Path | None = _setting(
        LISTEN, None, "Keys file (lorasb keys create): who may use the server, and for what."
    )
    ssl_certfile: Path | None = _setting(
        LISTEN, None, "Certificate chain in PEM; the server then speaks https only."
    )
    ssl_keyfile: Path | None = _setting(
        LISTEN, None, "The certificate's key in PEM, where it is not in the same file."
    )
    ssl_keyfile_password: SecretStr | None = _setting(LISTEN, None, "Password of the key file.")
    ssl_ca_certs: Path | None = _setting(
        LISTEN, None, "Certificates in PEM; clients must show one that is signed by one of them."
    )
    cors_origin: Origins = _setting(
        LISTEN, (), "Origin whose pages may call the server, as https://app.example; * for all."
    )
    root_path: str = _setting(
        LISTEN, "", "Path that a proxy has the server under, as /llm.", pattern=r"^(/[^/\s]+)*$"
    )

    refresh: FiniteFloat = _setting(
        ADAPTERS, 1.0, "Seconds after which a change in the store is seen.", ge=0.0
    )
    stale: FiniteFloat = _setting(
        ADAPTERS, 300.0, "Seconds that cached adapters are served while the store fails.", ge=0.0
    )
    store_timeout: FiniteFloat = _setting(
        ADAPTERS, 30.0, "Seconds that a request waits for the store at most.", ge=0.1
    )
    disk_cache: Path | None = _setting(
        ADAPTERS, None, "Folder that keeps fetched adapters; servers may share it."
    )
    disk_cache_gib: FiniteFloat | None = _setting(
        ADAPTERS, None, "Size of --disk-cache; 4 by default.", ge=0.001
    )
    pin: Names = _setting(ADAPTERS, (), "Adapter that is loaded at start and stays resident.")
    slots: int = _setting(ADAPTERS, 1024, "Adapters resident on the device, base included.", ge=2)

    engine: Literal["torch", "vllm"] = _setting(ENGINE, "torch", "What computes.")
    device: str = _setting(ENGINE, "cpu", "torch device; others than cpu are untested.")
    dtype: str | None = _setting(
        ENGINE, None, "bfloat16, float16 or float32; the checkpoint's own by default."
    )
    max_model_len: int | None = _setting(ENGINE, None, "Context length in tokens.", ge=2)
    max_num_seqs: int = _setting(ENGINE, 64, "Sequences that run at once.", ge=1)
    max_batched_tokens: int = _setting(ENGINE, 512, "Tokens computed in one step.", ge=1)
    kv_cache_gib: FiniteFloat = _setting(ENGINE, 2.0, "Memory of the KV cache.", ge=0.001)
    prefix_cache_gib: FiniteFloat = _setting(
        ENGINE, 0.5, "Memory that keeps past prompts' KV for later ones; 0: none.", ge=0.0
    )

    vllm_arg: Names = _setting(
        ENGINE, (), "For --engine vllm: an engine argument of vLLM's, as name=value."
    )

    max_queue: int = _setting(
        LOAD, 1024, "Sequences that may wait to run; a request for more gets 429.", ge=0
    )
    request_timeout: FiniteFloat | None = _setting(
        LOAD, None, "Seconds after which a request is ended; by default never.", gt=0.0
    )
    drain_timeout: FiniteFloat = _setting(
        LOAD, 20.0, "Seconds that running requests get to end in when the server stops.", ge=0.0
    )

    log_format: Literal["text", "json"] = _setting(
        WATCH, "text", "Log lines for people, or one JSON object each."
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        WATCH, "info", "The least grave log lines that are written."
    )
    otlp_endpoint: str | None = _setting(
        WATCH,
        None,
        "URL of an OTLP/HTTP collector that traces are sent to; needs the extra otel.",
        pattern=r"^https?://\S+$",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Nothing but what it is given: `sources` brings it together, and knows where from."""
        return (init_settings,)


def key_of(name: str) -> str:
    """A setting as it is written in the file."""
    return name.replace("_", "-")


def flag_of(name: str) -> str:
    """A setting as it is given on the command line; the model is its one argument."""
    return "MODEL" if name == "model" else f"--{key_of(name)}"


def variable_of(name: str) -> str:
    """A setting's environment variable."""
    return PREFIX + name.upper()
