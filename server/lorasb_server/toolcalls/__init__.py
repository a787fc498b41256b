"""Tool calls: how they are asked for in the prompt, forced by a grammar, and read from text."""
