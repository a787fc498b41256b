"""Engines: whatever satisfies the protocol of `base`. `torch/` is the embedded default."""
