"""Publish an adapter, swap it for another, go back, and remove it, while the server runs.

python examples/swap.py [ADAPTER_FILE OTHER_FILE]
"""

import os
import sys
from pathlib import Path

import httpx

one, other = sys.argv[1:] or ("demo/adapters/pirate.safetensors", "demo/adapters/haiku.safetensors")
server = httpx.Client(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    headers={"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"},
    timeout=60,
)


def call(method: str, path: str, **body: object) -> dict:
    response = server.request(method, path, **body)
    if response.is_error:
        sys.exit(response.json()["error"]["message"])
    return response.json()


def ask() -> str:
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    body = {"model": "guest", "messages": messages, "max_tokens": 40, "temperature": 0}
    return call("POST", "chat/completions", json=body)["choices"][0]["message"]["content"]


published = call("PUT", "adapters/guest", content=Path(one).read_bytes())
print("published", published["version"][:12], f"-> {ask()!r}")

swapped = call("PUT", "adapters/guest", content=Path(other).read_bytes())
print("swapped to", swapped["version"][:12], f"-> {ask()!r}")

back = call("POST", "adapters/guest/rollback")
print("rolled back to", back["version"][:12], f"-> {ask()!r}")

call("DELETE", "adapters/guest")
