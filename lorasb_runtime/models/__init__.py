"""Hugging Face models: finding, loading and adapting them."""
