"""lorasb's HTTP server: OpenAI's API on any engine, and the adapters behind it."""
