"""Entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes.

Imports nothing at load that can fail: vLLM only logs a plugin whose import raises and goes on
without it, while an error of `register` itself ends the process.
"""

import os

from lorasb_runtime.engines.vllm.plugin_settings import PluginSettings


def register() -> None:
    """Put our parts into this process's vLLM, if the environment configures them; safe to repeat.

    Raises InputError for a bad configuration, EngineError for a vLLM that is not the known one.
    """
    settings = PluginSettings.read(os.environ)
    if settings is None:
        return
    from lorasb_runtime.engines.vllm.patches import install

    install(settings)
