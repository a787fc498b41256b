"""LoRA-SB inside vLLM 0.32: a plugin for it, and our server's engine on it.

The only package that imports vllm, and only where its parts are used.
"""
