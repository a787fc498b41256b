"""An adapter that the server has never seen, sent along with the request.

python examples/inline_adapter.py [ADAPTER_FILE]
"""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

file = Path(sys.argv[1] if len(sys.argv) > 1 else "demo/adapters/pirate.safetensors")
client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)

answer = client.chat.completions.create(
    model=next(iter(client.models.list())).id,
    messages=[{"role": "user", "content": "Tell me about the sea."}],
    max_tokens=60,
    temperature=0,
    extra_body={"adapter": {"inline": base64.b64encode(file.read_bytes()).decode()}},
)
print(answer.choices[0].message.content)
