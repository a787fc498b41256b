"""Files on disk: bases, adapters, Hugging Face checkpoints. Knows no network, model or engine."""
