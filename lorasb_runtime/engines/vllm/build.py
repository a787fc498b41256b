"""Starts vLLM for our engine: its arguments from our configuration, ours on top of the user's."""

import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.plugins import DEFAULT_PLUGINS_GROUP
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from lorasb_runtime.config import EngineConfig
from lorasb_runtime.engines.base import EngineInfo
from lorasb_runtime.engines.vllm.engine import VllmEngine
from lorasb_runtime.engines.vllm.gauges import GaugeLogger, Gauges
from lorasb_runtime.engines.vllm.held_versions import AdapterBringer, HeldVersions, numbers_in_use
from lorasb_runtime.engines.vllm.patches import check_version
from lorasb_runtime.engines.vllm.plugin_settings import BASIS, REFRESH, STORE, PluginSettings
from lorasb_runtime.errors import EngineError, InputError
from lorasb_runtime.models.load import load_tokenizer, parse_dtype
from lorasb_runtime.models.text import TextCodec
from lorasb_runtime.storage.basis_file import Basis, load_basis

PLUGIN = "lorasb"
RAY_CARRIES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"  # to the workers on other machines
RAY_PREFIX = "LORASB_"
# Set by our own flags, or needed as they are; not to be given as `--vllm-arg`.
OURS = frozenset(
    (
        *("model", "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens"),
        *("kv_cache_memory_bytes", "enable_prefix_caching", "max_logprobs", "disable_log_stats"),
        *("enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras", "fully_sharded_loras"),
        *("lora_dtype", "lora_modules", "structured_outputs_config", "worker_extension_cls"),
    )
)


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"--vllm-arg: {message}")


def load_engine(
    folder: Path, basis: Path | None, config: EngineConfig, extra: Sequence[str] = ()
) -> VllmEngine:
    """Start vLLM's processes on the model, and build an engine on them.

    extra: vLLM's own engine arguments, `name=value` or a flag's `name`. Raises InputError for a
    configuration that cannot be served, EngineError when vLLM does not start.
    """
    check_version()
    if config.device != "cpu":
        raise InputError(f"--device: found {config.device!r}; vLLM runs where its build does")
    if config.pins:
        raise InputError("--pin: not supported with --engine vllm")
    _configure_plugin(basis)
    args = engine_args(folder, basis is not None, config, extra)
    loaded = None if basis is None else load_basis(basis)
    gauges = Gauges(slots=config.slots - 1 if loaded else 0)
    client = _start(args, gauges)
    try:
        return _engine(client, folder, loaded, config, gauges)
    except BaseException:
        client.shutdown()
        raise


def engine_args(
    folder: Path, has_basis: bool, config: EngineConfig, extra: Sequence[str]
) -> AsyncEngineArgs:
    """vLLM's arguments. Raises InputError for an extra one that is unknown, wrong or ours."""
    if config.dtype is not None:
        parse_dtype(config.dtype)
    parser = AsyncEngineArgs.add_cli_args(_Parser(add_help=False))
    words = []
    for argument in extra:
        name, equals, value = argument.partition("=")
        field = name.strip("-").replace("-", "_")
        if field.partition(".")[0] in OURS:
            raise InputError(f"--vllm-arg: found {name!r}, which lorasb sets itself")
        words.append(f"--{field.replace('_', '-')}" + (f"={value}" if equals else ""))
    args = AsyncEngineArgs.from_cli_args(parser.parse_args(words))
    args.model = str(folder)
    args.dtype = config.dtype or "auto"
    args.max_model_len = config.max_model_len or -1  # the model's own, or what the KV cache holds
    args.max_num_seqs = config.scheduler.max_num_seqs
    args.max_num_batched_tokens = max(
        config.scheduler.max_batched_tokens, config.scheduler.max_num_seqs
    )
    args.kv_cache_memory_bytes = config.cache.nbytes
    args.enable_prefix_caching = config.cache.prefix_nbytes > 0
    args.max_logprobs = -1
    args.disable_log_stats = True
    args.structured_outputs_config.backend = "guidance"
    args.structured_outputs_config.disable_any_whitespace = True
    if has_basis:
        args.enable_lora = True
        args.max_loras = config.slots - 1
        args.worker_extension_cls = "lorasb_runtime.engines.vllm.worker_report.WorkerReport"
    return args


def _configure_plugin(basis: Path | None) -> None:
    """By the environment, which vLLM's processes inherit. Names are resolved by our server."""
    for name in (BASIS, STORE, REFRESH):
        os.environ.pop(name, None)
    if basis is not None:
        check_plugin()
        os.environ.update(PluginSettings(basis.absolute()).as_environment())
        carried = os.environ.get(RAY_CARRIES, "")
        if RAY_PREFIX not in carried.split(","):
            os.environ[RAY_CARRIES] = f"{carried},{RAY_PREFIX}".strip(",")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def _start(args: AsyncEngineArgs, gauges: Gauges) -> AsyncLLM:
    try:
        return AsyncLLM.from_engine_args(
            args, stat_loggers=[lambda _, index: GaugeLogger(gauges, index)]
        )
    except ValueError as error:  # pydantic's too
        raise InputError(f"vLLM: {' '.join(str(error).split())[:500]}") from None
    except RuntimeError as error:
        raise EngineError(f"vLLM did not start; its log says why ({error})") from None


def check_plugin() -> None:
    """Raises EngineError where vLLM's processes would start without the plugin."""
    allowed = envs.VLLM_PLUGINS
    if not entry_points(group=DEFAULT_PLUGINS_GROUP, name=PLUGIN):
        raise EngineError("vLLM will not find lorasb's plugin: the package is not installed here")
    if allowed is not None and PLUGIN not in allowed:
        raise EngineError(f"VLLM_PLUGINS: found {allowed}, expected {PLUGIN!r} among them")


def _engine(
    client: Any, folder: Path, basis: Basis | None, config: EngineConfig, gauges: Gauges
) -> VllmEngine:
    vllm_config = client.vllm_config
    model, cache = vllm_config.model_config, vllm_config.cache_config
    gauges.kv_tokens = (cache.num_gpu_blocks or 0) * cache.block_size
    dtype = str(model.dtype).removeprefix("torch.")
    running = config.scheduler.max_num_seqs
    info = EngineInfo(model.max_model_len, model.get_vocab_size(), dtype, dtype, running)
    bringer = None
    if basis is not None:
        lora = vllm_config.lora_config
        held = HeldVersions(basis, lora.lora_dtype, lora.max_loras, lambda: numbers_in_use(client))
        bringer = AdapterBringer(client, held)
    return VllmEngine(client, TextCodec(load_tokenizer(folder)), info, bringer, gauges)
