"""`lorasb serve`: the OpenAI-compatible server on one model, one basis and one adapter store."""

import ipaddress
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lorasb_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from lorasb_runtime.errors import InputError, NotFoundError
from lorasb_tools.report import note
from lorasb_tools.serve_vllm import check_vllm_flags, vllm_engine

if TYPE_CHECKING:
    from lorasb_runtime.adapters.loader import AdapterLoader
    from lorasb_runtime.adapters.loader_config import LoaderConfig
    from lorasb_runtime.adapters.names import AdapterName
    from lorasb_runtime.engines.base import Engine
    from lorasb_runtime.engines.torch.engine import TorchEngine

MEMORY_STORE = "memory://lorasb"
ENGINES = ("torch", "vllm")


def serve(
    model: str = typer.Argument(help="Hugging Face id or local folder."),
    basis: Path | None = typer.Option(None, help="Basis file that all adapters share."),
    adapters: str | None = typer.Option(None, help="Adapter store: a folder or fsspec URL."),
    pack: Path | None = typer.Option(
        None, help="Pack file: read adapters from it where it has the store's version of them."
    ),
    engine: str = typer.Option("torch", help=f"One of: {', '.join(ENGINES)}."),
    dtype: str | None = typer.Option(
        None, help="bfloat16, float16 or float32; the checkpoint's own by default."
    ),
    host: str = typer.Option("127.0.0.1", help="Address to listen on."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port to listen on; 0 chooses one."),
    allow_open: bool = typer.Option(
        False, help="Listen beyond loopback although anyone who reaches the port may do anything."
    ),
    api_keys: Path | None = typer.Option(
        None, help="Keys file (lorasb keys create): who may use the server, and for what."
    ),
    merged: str | None = typer.Option(
        None, help="Fold this adapter into the weights at start and serve that model alone."
    ),
    served_model_name: str | None = typer.Option(
        None, help="Name of the base model; by default the id, or the folder's own name."
    ),
    refresh: float = typer.Option(
        1.0, min=0.0, help="Seconds after which a change in the store is seen."
    ),
    stale: float = typer.Option(
        300.0, min=0.0, help="Seconds that cached adapters are served while the store fails."
    ),
    store_timeout: float = typer.Option(
        30.0, min=0.1, help="Seconds that a request waits for the store at most."
    ),
    disk_cache: Path | None = typer.Option(
        None, help="Folder that keeps fetched adapters; servers may share it."
    ),
    disk_cache_gib: float | None = typer.Option(
        None, min=0.001, help="Size of --disk-cache; 4 by default."
    ),
    pin: list[str] = typer.Option(
        [], help="Adapter that is loaded at start and stays resident; may be given often."
    ),
    slots: int = typer.Option(1024, min=2, help="Adapters resident on the device, base included."),
    max_model_len: int | None = typer.Option(None, min=2, help="Context length in tokens."),
    max_num_seqs: int = typer.Option(64, min=1, help="Sequences that run at once."),
    max_batched_tokens: int = typer.Option(512, min=1, help="Tokens computed in one step."),
    kv_cache_gib: float = typer.Option(2.0, min=0.001, help="Memory of the KV cache."),
    prefix_cache_gib: float = typer.Option(
        0.5, min=0.0, help="Memory that keeps past prompts' KV for later ones; 0: none."
    ),
    device: str = typer.Option("cpu", help="torch device; others than cpu are untested."),
    vllm_arg: list[str] = typer.Option(
        [], help="For --engine vllm: an engine argument of vLLM's, name=value; may be given often."
    ),
) -> None:
    """Serve MODEL with a different adapter for each request, over OpenAI's HTTP API."""
    from lorasb_runtime.adapters.loader_config import LoaderConfig
    from lorasb_runtime.models.locate import locate_model, model_name
    from lorasb_server.app import create_app
    from lorasb_server.run import run_server
    from lorasb_server.settings import ServerConfig
    from lorasb_server.tenants.key_ring import KeyRing

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    _check_flags(engine, basis, adapters or pack, merged)
    check_vllm_flags(engine, merged, vllm_arg)
    _check_openness(host, allow_open, api_keys)
    if disk_cache_gib is not None and disk_cache is None:
        raise InputError("--disk-cache-gib needs --disk-cache, the folder whose size it limits")
    pins = _parse_pins(pin, basis, merged)
    keys = None if api_keys is None else KeyRing(api_keys)
    config = EngineConfig(
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        slots=slots,
        pins=frozenset(map(str, pins)),
        cache=CacheConfig(
            nbytes=int(kv_cache_gib * (1 << 30)), prefix_nbytes=int(prefix_cache_gib * (1 << 30))
        ),
        scheduler=SchedulerConfig(max_num_seqs, max_batched_tokens),
    )
    note(f"lorasb: loading {model}")
    folder = locate_model(model)
    loading = LoaderConfig(
        refresh=refresh,
        stale=stale,
        timeout=store_timeout,
        disk_cache=disk_cache,
        pins=pins,
        disk_cache_bytes=int((disk_cache_gib or 4.0) * (1 << 30)),
    )
    loader = _open_loader(folder, basis, adapters, pack, loading)
    name = served_model_name or model_name(model)
    aliases: tuple[str, ...] = () if served_model_name else (model,)
    built: Engine
    if engine == "vllm":
        built = vllm_engine(folder, basis, config, vllm_arg)
    elif merged is not None:
        assert loader is not None
        built = _merged_engine(folder, loader, merged, config)
        name, aliases, loader = merged, (), None
    else:
        built = _engine(folder, loader, config)
    settings = ServerConfig(model_name=name, model_aliases=aliases, created=int(time.time()))
    run_server(create_app(built, loader, settings, keys), host, port)


def _check_flags(
    engine: str, basis: Path | None, adapters: str | Path | None, merged: str | None
) -> None:
    if engine not in ENGINES:
        raise InputError(f"engine: found {engine!r}, expected one of {', '.join(ENGINES)}")
    if adapters is not None and basis is None:
        raise InputError("--adapters and --pack need --basis, without which adapters mean nothing")
    if merged is not None and adapters is None:
        raise InputError("--merged needs --basis and --adapters, where the adapter is")


def _check_openness(host: str, allow_open: bool, api_keys: Path | None) -> None:
    if allow_open and api_keys is not None:
        raise InputError("--allow-open: not with --api-keys, which says who may do what")
    if not (allow_open or api_keys is not None or _is_loopback(host)):
        raise InputError(
            f"host: found {host!r}, expected a loopback address; anyone who reaches the port "
            "could use and change every adapter (--api-keys FILE, or --allow-open if that is meant)"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _open_loader(
    folder: Path,
    basis: Path | None,
    adapters: str | None,
    pack: Path | None,
    config: "LoaderConfig",
) -> "AdapterLoader | None":
    from lorasb_runtime.adapters.loader import AdapterLoader
    from lorasb_runtime.adapters.pack_files import PackFiles
    from lorasb_runtime.adapters.retry import Retry
    from lorasb_runtime.adapters.store import AdapterStore
    from lorasb_runtime.storage.basis_file import load_basis
    from lorasb_runtime.storage.checkpoint import open_checkpoint
    from lorasb_runtime.storage.match import check_model

    if basis is None:
        return None
    if adapters is None and pack is not None:
        note(f"lorasb: no --adapters; the adapters are those of {pack}, and cannot be changed")
        adapters, pack = str(pack), None
    elif adapters is None:
        note("lorasb: no --adapters; adapters put here live in memory and end with the server")
        adapters = MEMORY_STORE
    loaded = load_basis(basis)
    check_model(loaded, open_checkpoint(folder), str(basis))
    retry = Retry(config.retry_config())
    store = AdapterStore(adapters, retry)
    return AdapterLoader(
        store, loaded, config, pack=PackFiles(str(pack), retry) if pack is not None else None
    )


def _parse_pins(pin: list[str], basis: Path | None, merged: str | None) -> "frozenset[AdapterName]":
    from lorasb_runtime.adapters.names import parse_name

    if pin and (basis is None or merged is not None):
        raise InputError("--pin needs --basis, and slots to pin adapters in: not with --merged")
    return frozenset(parse_name(name) for name in pin)


def _engine(folder: Path, loader: "AdapterLoader | None", config: EngineConfig) -> "TorchEngine":
    from lorasb_runtime.engines.torch.build import load_engine

    if loader is None:
        return load_engine(folder, None, config)
    built = load_engine(folder, loader.basis, config)
    for name in sorted(loader.config.pins):
        try:
            built.warm(loader.get(name))
        except NotFoundError:
            note(f"lorasb: --pin {name}: not in the store yet; pinned from its first request on")
    return built


def _merged_engine(
    folder: Path, loader: "AdapterLoader", name: str, config: EngineConfig
) -> "TorchEngine":
    from lorasb_runtime.adapters.names import parse_name
    from lorasb_runtime.engines.torch.build import build_engine
    from lorasb_runtime.engines.torch.prepare import load_model
    from lorasb_runtime.merging.fold_model import fold_into_model
    from lorasb_runtime.models.load import load_tokenizer, parse_device, parse_dtype
    from lorasb_runtime.models.text import TextCodec
    from lorasb_runtime.ops.core_matmul import scale_core

    cores = scale_core(loader.get(parse_name(name)).cores, loader.basis.scaling)
    dtype = parse_dtype(config.dtype) if config.dtype else None
    model = load_model(
        folder,
        dtype,
        parse_device(config.device),
        lambda loaded: fold_into_model(loaded, loader.basis, cores),
    )
    return build_engine(model, TextCodec(load_tokenizer(folder)), None, config)
