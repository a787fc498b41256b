"""`lorasb serve`: the OpenAI-compatible server on one model, one basis and one adapter store."""

import importlib
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from lorasb_runtime.errors import InputError
from lorasb_tools.report import JSON_FLAG, emit
from lorasb_tools.setting_flags import given, with_setting_flags

if TYPE_CHECKING:
    from lorasb_server.lifecycle import Lifecycle
    from lorasb_server.settings import ListenConfig, Settings


@with_setting_flags
def serve(
    *,
    show_config: bool = typer.Option(
        False, "--show-config", help="Print the settings and where each came from, and end."
    ),
    as_json: bool = JSON_FLAG,
    **flags: Any,
) -> None:
    """Serve MODEL with a different adapter for each request, over OpenAI's HTTP API.

    Each setting is also a variable (LORASB_PORT for --port) and a key of the --config file (port);
    flags win over variables, variables over the file.
    """
    from lorasb_server.settings.shown import as_file, as_object
    from lorasb_server.settings.sources import read_settings

    sourced = read_settings(given(flags))
    if show_config:
        emit(as_object(sourced), as_file(sourced), as_json)
    elif as_json:
        raise InputError("--json: only with --show-config")
    else:
        _run(sourced.settings)


def _run(settings: "Settings") -> NoReturn:
    from lorasb_runtime.adapters.names import parse_name
    from lorasb_server.logs import set_up_logs
    from lorasb_server.run import leave, run_server
    from lorasb_server.tenants.key_ring import KeyRing

    if settings.model is None:
        raise InputError("MODEL: expected one, as an argument or as a setting")
    if settings.otlp_endpoint is not None:
        _need_opentelemetry()
    pins = frozenset(map(parse_name, settings.pin))
    keys = None if settings.api_keys is None else KeyRing(settings.api_keys)
    set_up_logs(settings.log_format, settings.log_level)

    def load(lifecycle: "Lifecycle") -> Any:
        from lorasb_tools.serve_parts import load_app  # with transformers, which takes its time

        return load_app(settings, pins, keys, lifecycle)

    run_server(load, _listen_config(settings))
    leave(0)


def _need_opentelemetry() -> None:
    try:
        importlib.import_module("lorasb_server.traces")
    except ImportError as error:
        raise InputError(
            f"--otlp-endpoint needs OpenTelemetry: pip install 'lorasb[otel]' ({error})"
        ) from None


def _listen_config(settings: "Settings") -> "ListenConfig":
    from lorasb_server.settings import ListenConfig, Tls

    tls = None
    if settings.ssl_certfile is not None:
        password = settings.ssl_keyfile_password
        tls = Tls(
            settings.ssl_certfile,
            settings.ssl_keyfile,
            password.get_secret_value() if password else None,
            settings.ssl_ca_certs,
        )
    return ListenConfig(
        settings.host,
        settings.port,
        settings.drain_timeout,
        tls,
        settings.cors_origin,
        settings.root_path,
    )
