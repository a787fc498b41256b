"""The embedded engine: Hugging Face modules, continuous batching, a core of its own per row."""
