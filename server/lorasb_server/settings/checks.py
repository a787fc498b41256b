"""What settings must be together."""

import ipaddress

from lorasb_runtime.errors import InputError
from lorasb_server.settings.declared import Settings


def check_settings(settings: Settings) -> None:
    """Raises InputError for settings that contradict each other."""
    _check_adapters(settings)
    _check_vllm(settings)
    _check_openness(settings)
    _check_tls(settings)


def _check_adapters(settings: Settings) -> None:
    adapters = settings.adapters or settings.pack
    if adapters is not None and settings.basis is None:
        raise InputError("--adapters and --pack need --basis, without which adapters mean nothing")
    if settings.merged is not None and adapters is None:
        raise InputError("--merged needs --basis and --adapters, where the adapter is")
    if settings.pin and (settings.basis is None or settings.merged is not None):
        raise InputError("--pin needs --basis, and slots to pin adapters in: not with --merged")
    if settings.disk_cache_gib is not None and settings.disk_cache is None:
        raise InputError("--disk-cache-gib needs --disk-cache, the folder whose size it limits")


def _check_vllm(settings: Settings) -> None:
    if settings.engine == "vllm" and settings.merged is not None:
        raise InputError("--merged: not with --engine vllm; `lorasb merge` writes a checkpoint")
    if settings.engine != "vllm" and settings.vllm_arg:
        raise InputError(f"--vllm-arg: found {settings.vllm_arg[0]!r} without --engine vllm")


def _check_openness(settings: Settings) -> None:
    host = settings.host
    if settings.allow_open and settings.api_keys is not None:
        raise InputError("--allow-open: not with --api-keys, which says who may do what")
    if not (settings.allow_open or settings.api_keys is not None or _is_loopback(host)):
        raise InputError(
            f"host: found {host!r}, expected a loopback address; anyone who reaches the port "
            "could use and change every adapter (--api-keys FILE, or --allow-open if that is meant)"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_tls(settings: Settings) -> None:
    if settings.ssl_certfile is not None:
        return
    for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
        if getattr(settings, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} needs --ssl-certfile")
